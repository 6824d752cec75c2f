//! Which blocks have something to learn, and what is known at the start of each.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::state::State;
use crate::blocks::{Block, Blocks};

/// The states at the starts of a function's blocks, and the blocks that are to be visited.
#[derive(Debug)]
pub(crate) struct Worklist<'a> {
    blocks: &'a Blocks,
    states: Vec<Option<Box<State>>>,
    /// In order of address, which is close to the order of execution.
    waiting: BinaryHeap<Reverse<usize>>,
    is_waiting: Vec<bool>,
    /// Facts in all states.
    held: usize,
    spare: &'a mut Spare,
}

/// States that are of no more use, whose memory is.
#[derive(Debug, Default)]
pub(crate) struct Spare(VecDeque<Box<State>>);

/// What all states may hold at a time; a thousandth is usual.
const MOST_HELD: usize = 2 << 20;
/// How many states to keep the memory of.
const MOST_SPARE: usize = 256;

impl<'a> Worklist<'a> {
    /// Starts with the first block, in state `entry`.
    pub fn new(blocks: &'a Blocks, entry: &State, spare: &'a mut Spare) -> Self {
        let mut states: Vec<_> = std::iter::repeat_with(|| None).take(blocks.len()).collect();
        let held = entry.facts();
        if let Some(first) = states.first_mut() {
            *first = Some(spare.copy(entry));
        }
        let mut list = Self {
            blocks,
            states,
            waiting: BinaryHeap::new(),
            is_waiting: vec![false; blocks.len()],
            held,
            spare,
        };
        list.wait(0);
        list
    }

    /// Whether more is known than code of the compiler's ever needs.
    pub fn overflows(&self) -> bool {
        self.held > MOST_HELD
    }

    /// The next block to visit: its index, itself, and what is known at its start.
    pub fn next(&mut self) -> Option<(usize, Block<'a>, Box<State>)> {
        while let Some(Reverse(at)) = self.waiting.pop() {
            if let Some(waits) = self.is_waiting.get_mut(at) {
                *waits = false;
            }
            let Some(block) = self.blocks.get(at) else {
                continue;
            };
            // The only predecessor of a block brings its state anew, should it change.
            let known = self.states.get_mut(at);
            let state = if block.previous.len() > 1 {
                known
                    .and_then(|known| known.as_ref())
                    .map(|known| self.spare.copy(known))
            } else {
                let taken = known.and_then(Option::take);
                self.held -= taken.as_ref().map_or(0, |s| s.facts().min(self.held));
                taken
            };
            if let Some(state) = state {
                return Some((at, block, state));
            }
        }
        None
    }

    /// Control may go to block `at` in this state, and with this pointer not nil.
    pub fn reach(&mut self, at: usize, state: &State, not_nil: Option<u32>) {
        if !self.join(at, state, not_nil) {
            let state = self.spare.copy(state);
            self.put(at, state, not_nil);
        }
    }

    /// Like [`Self::reach`], the last time with this state.
    pub fn reach_last(&mut self, at: usize, state: Box<State>, not_nil: Option<u32>) {
        if self.join(at, &state, not_nil) {
            self.give_back(state);
        } else {
            self.put(at, state, not_nil);
        }
    }

    /// A state that is of no more use.
    pub fn give_back(&mut self, state: Box<State>) {
        self.spare.take(state);
    }

    /// Joins a state into what is known of a block; false if that is nothing, or of no interest.
    fn join(&mut self, at: usize, state: &State, not_nil: Option<u32>) -> bool {
        if self.is_alone(at) {
            return false;
        }
        let Some(Some(known)) = self.states.get_mut(at) else {
            return false;
        };
        if known.join(state, not_nil) {
            self.wait(at);
        }
        true
    }

    fn put(&mut self, at: usize, mut state: Box<State>, not_nil: Option<u32>) {
        if let Some(definition) = not_nil {
            state.is_not_nil(definition);
        }
        let Some(place) = self.states.get_mut(at) else {
            return;
        };
        self.held += state.facts();
        if let Some(old) = place.replace(state) {
            self.held -= old.facts().min(self.held);
            self.give_back(old);
        }
        self.wait(at);
    }

    fn wait(&mut self, at: usize) {
        if let Some(waits) = self.is_waiting.get_mut(at)
            && !std::mem::replace(waits, true)
        {
            self.waiting.push(Reverse(at));
        }
    }

    fn is_alone(&self, at: usize) -> bool {
        self.blocks.get(at).is_some_and(|b| b.previous.len() <= 1)
    }
}

impl Drop for Worklist<'_> {
    fn drop(&mut self) {
        for state in self.states.drain(..).flatten() {
            self.spare.take(state);
        }
    }
}

impl Spare {
    fn copy(&mut self, state: &State) -> Box<State> {
        match self.0.pop_back() {
            Some(mut copy) => {
                (*copy).clone_from(state);
                copy
            }
            None => Box::new(state.clone()),
        }
    }

    fn take(&mut self, state: Box<State>) {
        if self.0.len() < MOST_SPARE {
            self.0.push_back(state);
        }
    }
}
