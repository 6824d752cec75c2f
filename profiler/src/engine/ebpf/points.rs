//! Everything that is to be probed, instruction by instruction.
//!
//! One instruction may answer several questions: the end of one deferred call and the start of the
//! next, or the registrations of neighbouring defers. It gets one probe, whose cookie names a list of
//! answers in the order in which they happen: links that know probes by address could not tell two
//! apart, and two programs at one instruction run in no certain order.

use std::{collections::BTreeMap, io};

use deferprof_ebpf_common::{Cookie, MAX_SEVERAL, Role, Several};
use deferprof_symbols::{FileOffset, ProbePoint, RunEvent};

use crate::engine::{EngineError, InstructionCost, Request};

/// A probe as the links take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) offset: FileOffset,
    pub(super) cookie: Cookie,
}

/// All probes of a request.
#[derive(Debug, Default)]
pub(super) struct Points {
    /// One for each instruction.
    pub(super) placed: Vec<Placed>,
    /// What the instructions stand for that stand for several things.
    pub(super) lists: Vec<Several>,
}

/// When something happens that one instruction stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    CallReturned,
    Registered,
    RecordTaken,
    CallStarts,
}

impl Points {
    pub(super) fn new(request: &Request<'_>) -> Result<Self, EngineError> {
        let mut collected = Collected::default();
        let latency = request.more.latency;
        for probe in request.probes {
            let takes_record = latency.and_then(|l| l.takes_record.get(probe.site as usize));
            let role = match takes_record.copied().unwrap_or(false) {
                true => Role::RegisteredRecord,
                false => Role::Registered,
            };
            let cost = request.cost(probe.site);
            collected.add(probe.offset, cost, Order::Registered, role, probe.site);
        }
        if let Some(pool) = request.more.pool {
            for (number, probe) in (0..).zip(&pool.probes) {
                collected.point(&probe.point, Order::RecordTaken, Role::Pool, number);
            }
        }
        if let Some(runs) = request.more.runs {
            for exit in runs.exits {
                if let Some((start, cost)) = exit.start {
                    collected.add(start, cost, Order::CallStarts, Role::Exit, exit.site);
                }
                if let (Some((end, cost)), Some(_)) = (exit.end, latency) {
                    collected.add(end, cost, Order::CallReturned, Role::ExitReturned, 0);
                }
            }
            let of_runtime = runs.probes.map_or(&[][..], |runs| &runs.probes);
            for (number, probe) in (0..).zip(of_runtime) {
                let order = match probe.event {
                    RunEvent::Returned if latency.is_none() => continue,
                    RunEvent::Taken if latency.is_none() && !probe.keeps => continue,
                    RunEvent::Returned => Order::CallReturned,
                    RunEvent::Taken => Order::RecordTaken,
                    _ => Order::CallStarts,
                };
                collected.point(&probe.point, order, Role::Run, number);
            }
            let first = u32::try_from(of_runtime.len()).unwrap_or(u32::MAX);
            for (number, entry) in (first..).zip(runs.entries) {
                collected.point(&entry.point, Order::CallStarts, Role::Run, number);
            }
        }
        collected.place()
    }
}

#[derive(Default)]
struct Collected(BTreeMap<u64, (bool, Vec<(Order, Cookie)>)>);

impl Collected {
    fn point(&mut self, point: &ProbePoint, order: Order, role: Role, number: u32) {
        let cost = InstructionCost::of(point);
        self.add(point.offset, cost, order, role, number);
    }

    fn add(
        &mut self,
        FileOffset(offset): FileOffset,
        cost: InstructionCost,
        order: Order,
        role: Role,
        number: u32,
    ) {
        let (stepped, answers) = self.0.entry(offset).or_default();
        *stepped |= cost == InstructionCost::SingleStepped;
        let answer = (order, Cookie::new(role, number));
        // Calls may share the instruction behind them, and the ways to an exit its call.
        if !answers.contains(&answer) {
            answers.push(answer);
        }
    }

    fn place(self) -> Result<Points, EngineError> {
        let mut points = Points::default();
        for (offset, (stepped, mut answers)) in self.0 {
            let offset = FileOffset(offset);
            answers.sort_by_key(|(order, _)| *order);
            let cookies: Vec<Cookie> = answers.into_iter().map(|(_, cookie)| cookie).collect();
            let cookie = if let [cookie] = cookies[..] {
                cookie
            } else {
                let list = together(&cookies).ok_or_else(|| EngineError::InvalidProbe {
                    offset,
                    source: io::Error::other(format!(
                        "it would answer {} questions together",
                        cookies.len()
                    )),
                })?;
                let number = u32::try_from(points.lists.len()).unwrap_or(u32::MAX);
                points.lists.push(list);
                Cookie::new(Role::Several, number)
            };
            let cookie = match stepped {
                true => cookie.single_stepped(),
                false => cookie,
            };
            points.placed.push(Placed { offset, cookie });
        }
        Ok(points)
    }
}

/// What an instruction stands for together; `None` if it is more than one list has room for.
fn together(cookies: &[Cookie]) -> Option<Several> {
    let mut several = Several {
        returned: 0,
        length: 0,
        sites: [0; MAX_SEVERAL],
        exit: Several::NO_EXIT,
    };
    let is = |cookie: &Cookie, role: Role| cookie.role() == role as u32;
    for cookie in cookies {
        let takes_record = is(cookie, Role::RegisteredRecord);
        if is(cookie, Role::ExitReturned) {
            several.returned = 1;
        } else if is(cookie, Role::Registered) || takes_record {
            let flag = if takes_record {
                Several::TAKES_RECORD
            } else {
                0
            };
            *several.sites.get_mut(several.length as usize)? = cookie.number() | flag;
            several.length += 1;
        } else if is(cookie, Role::Exit) && several.exit == Several::NO_EXIT {
            several.exit = cookie.number();
        } else {
            // No site is where the runtime takes records or makes calls.
            return None;
        }
    }
    Some(several)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_of_several_questions_gets_one_probe_and_their_order() {
        use InstructionCost::{Emulated, SingleStepped};
        let mut collected = Collected::default();
        let mut add = |offset, cost, order, role, number| {
            collected.add(FileOffset(offset), cost, order, role, number);
        };
        add(8, Emulated, Order::CallStarts, Role::Exit, 1);
        add(16, SingleStepped, Order::Registered, Role::Registered, 2);
        add(8, Emulated, Order::Registered, Role::Registered, 1);
        add(8, Emulated, Order::CallReturned, Role::ExitReturned, 0);
        add(8, Emulated, Order::CallReturned, Role::ExitReturned, 0);
        let points = collected.place().unwrap();
        let cookies: Vec<_> = points
            .placed
            .iter()
            .map(|p| (p.offset.0, p.cookie))
            .collect();
        let single = Cookie::new(Role::Registered, 2).single_stepped();
        assert_eq!(cookies, [(8, Cookie::new(Role::Several, 0)), (16, single)]);
        let list = points.lists[0];
        assert_eq!(
            (list.returned, list.length, list.sites[0], list.exit),
            (1, 1, 1, 1)
        );
    }

    #[test]
    fn too_many_questions_are_refused() {
        let mut collected = Collected::default();
        for site in 0..=MAX_SEVERAL as u32 {
            let (order, role) = (Order::Registered, Role::Registered);
            collected.add(FileOffset(8), InstructionCost::Emulated, order, role, site);
        }
        assert!(matches!(
            collected.place(),
            Err(EngineError::InvalidProbe { .. })
        ));
    }
}
