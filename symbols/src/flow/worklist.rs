//! Which blocks have something to learn, and what is known at the start of each.

use std::collections::VecDeque;

use super::state::State;
use super::value::Definition;
use crate::blocks::{Block, Blocks};

/// The states at the starts of a function's blocks, and the blocks that are to be visited.
#[derive(Debug)]
pub(crate) struct Worklist<'a> {
    blocks: &'a Blocks,
    /// Facts in all states.
    held: usize,
    memory: &'a mut Memory,
}

/// What worklists need, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// By block.
    states: Vec<Option<Box<State>>>,
    waiting: Waiting,
    /// States that are of no more use, whose memory is.
    spare: VecDeque<Box<State>>,
}

/// Blocks that are to be visited: in order of address, which is close to the order of execution.
#[derive(Debug, Default)]
struct Waiting {
    /// A bit a block.
    words: Vec<u64>,
    /// No word before this one has a bit.
    first: usize,
}

/// What all states may hold at a time; a thousandth is usual.
const MOST_HELD: usize = 2 << 20;
/// How many states to keep the memory of.
const MOST_SPARE: usize = 256;

impl<'a> Worklist<'a> {
    /// Starts with the first block, in state `entry`.
    pub fn new(blocks: &'a Blocks, entry: &State, memory: &'a mut Memory) -> Self {
        memory.clear();
        memory.states.resize_with(blocks.len(), || None);
        memory.waiting.words.resize(blocks.len().div_ceil(64), 0);
        let mut list = Self {
            blocks,
            held: 0,
            memory,
        };
        list.reach(0, entry, None);
        list
    }

    /// Whether more is known than code of the compiler's ever needs.
    pub fn overflows(&self) -> bool {
        self.held > MOST_HELD
    }

    /// The next block to visit: its index, itself, and what is known at its start.
    pub fn next(&mut self) -> Option<(usize, Block<'a>, Box<State>)> {
        let memory = &mut *self.memory;
        while let Some(at) = memory.waiting.pop() {
            let (Some(block), Some(known)) = (self.blocks.get(at), memory.states.get_mut(at))
            else {
                continue;
            };
            // The only predecessor of a block brings its state anew, should it change.
            let state = if block.previous.len() > 1 {
                let known = known.as_ref();
                known.map(|known| copy(&mut memory.spare, known))
            } else {
                let taken = known.take();
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
    pub fn reach(&mut self, at: usize, state: &State, not_nil: Option<Definition>) {
        if !self.join(at, state, not_nil) {
            let state = copy(&mut self.memory.spare, state);
            self.put(at, state, not_nil);
        }
    }

    /// Like [`Self::reach`], the last time with this state.
    pub fn reach_last(&mut self, at: usize, state: Box<State>, not_nil: Option<Definition>) {
        if self.join(at, &state, not_nil) {
            self.give_back(state);
        } else {
            self.put(at, state, not_nil);
        }
    }

    /// A state that is of no more use.
    pub fn give_back(&mut self, state: Box<State>) {
        self.memory.give_back(state);
    }

    /// Joins a state into what is known of a block; false if that is nothing, or of no interest.
    fn join(&mut self, at: usize, state: &State, not_nil: Option<Definition>) -> bool {
        // What the only predecessor of a block brought before is taken, or of no interest.
        if !self.blocks.is_joined(at) {
            return false;
        }
        let Some(Some(known)) = self.memory.states.get_mut(at) else {
            return false;
        };
        if known.join(state, not_nil) {
            self.memory.waiting.push(at);
        }
        true
    }

    fn put(&mut self, at: usize, mut state: Box<State>, not_nil: Option<Definition>) {
        if let Some(definition) = not_nil {
            state.is_not_nil(definition);
        }
        let Some(place) = self.memory.states.get_mut(at) else {
            return;
        };
        self.held += state.facts();
        if let Some(old) = place.replace(state) {
            self.held -= old.facts().min(self.held);
            self.memory.give_back(old);
        }
        self.memory.waiting.push(at);
    }
}

impl Memory {
    fn clear(&mut self) {
        let Self {
            states,
            waiting,
            spare,
        } = self;
        spare.extend(states.drain(..).flatten());
        spare.truncate(MOST_SPARE);
        waiting.words.clear();
        waiting.first = 0;
    }

    fn give_back(&mut self, state: Box<State>) {
        if self.spare.len() < MOST_SPARE {
            self.spare.push_back(state);
        }
    }
}

impl Waiting {
    fn push(&mut self, block: usize) {
        if let Some(word) = self.words.get_mut(block / 64) {
            *word |= 1 << (block % 64);
            self.first = self.first.min(block / 64);
        }
    }

    fn pop(&mut self) -> Option<usize> {
        loop {
            let word = self.words.get_mut(self.first)?;
            if *word != 0 {
                let bit = word.trailing_zeros();
                *word &= *word - 1;
                return Some(self.first * 64 + bit as usize);
            }
            self.first += 1;
        }
    }
}

/// A copy of `state`, in memory that is to spare if there is some.
fn copy(spare: &mut VecDeque<Box<State>>, state: &State) -> Box<State> {
    match spare.pop_back() {
        Some(mut copy) => {
            (*copy).clone_from(state);
            copy
        }
        None => Box::new(state.clone()),
    }
}
