//! The runtime's own rare paths that tell where heap records came from.
//!
//! `runtime.newdefer` takes a record from the P's local pool. If that is empty it calls `lock2` and
//! fills the pool from the central one (a *refill*); if it is still empty it calls `newobject` (a
//! *miss*). What gives a record back (`freedefer`, since 1.23 `popDefer`) calls `lock2` when the local
//! pool is full (a *spill*). So probes on these CALLs cost nothing where the pool serves, and are
//! beyond the stack check, which a grown stack would execute again.
//!
//! The CALLs are found by decoding, by target, wherever the compiler put them: a profile-guided build
//! may inline newdefer into deferproc. Whose registration it was is told by return addresses; the
//! stack depths of pclntab say where on the stack these are. (Go `runtime/panic.go`, 1.18 to 1.27.)

use super::{Decoded, Search};
use crate::VirtualAddress;
use crate::decode::{Instruction, Op};
use crate::dwarf::Members;
use crate::elf::Image;
use crate::module::Module;
use crate::plan::ProbePoint;
use crate::release::Release;

/// Functions that take records, and all that the compiler may inline newdefer into.
const TAKERS: [&str; 7] = [
    "newdefer",
    "deferproc",
    "deferprocat",
    "deferrangefunc",
    "addOneOpenDeferFrame",
    "addOneOpenDeferFrame.func1",
    "addOneOpenDeferFrame.func1.1",
];

/// Functions that give records back, and all that the compiler may inline these into.
const GIVERS: [&str; 9] = [
    "freedefer",
    "popDefer",
    "(*_panic).nextDefer",
    "(*_panic).nextFrame",
    "deferconvert",
    "deferreturn",
    "runOpenDeferFrame",
    "gopanic",
    "Goexit",
];

/// What the site itself calls. Others take records that belong to no site.
const REGISTERING: [&str; 2] = ["deferproc", "deferprocat"];

/// The probes that tell pool outcomes, and what they need to know of the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolProbes {
    /// The probes.
    pub probes: Vec<PoolProbe>,
    /// Where the local pool is.
    pub local: LocalPool,
}

/// One probe on a rare path.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolProbe {
    /// The instruction.
    pub point: ProbePoint,
    /// What its execution says.
    pub event: PoolEvent,
    /// How the stack names the site; empty for [`PoolEvent::Spill`] and where a record belongs to
    /// no site.
    pub callers: Vec<Caller>,
}

/// What a probe on a rare path saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PoolEvent {
    /// The central pool was asked; there were records if the local pool is no longer empty.
    Asked,
    /// A record is about to be allocated.
    Miss,
    /// Half of a full local pool is about to go to the central pool.
    Spill,
}

/// A way to the site's return address from a probe's stack pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The return address at this offset from SP is the site's.
    Site(u64),
    /// It is if the return address at offset `via` is `returns_to`.
    Through {
        /// Offset from SP of the return address of the function with the probe.
        via: u64,
        /// Where in the registering function that is, as linked.
        returns_to: VirtualAddress,
        /// Offset from SP of the registering function's own return address.
        site: u64,
    },
}

/// How to get from the goroutine to the length of its P's pool, in bytes.
/// A slice follows at `pool`: pointer, length, capacity, and right behind it the array that the
/// pointer must point to, which shows at run time that the offsets are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalPool {
    /// `g.m`
    pub m: u64,
    /// `m.p`
    pub p: u64,
    /// `p.deferpool`
    pub pool: u64,
    /// What the capacity must be.
    pub capacity: u64,
}

/// Why pool outcomes cannot be had from a binary.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolUnavailable {
    /// Up to 1.17 the rare paths run on the system stack, with five pools by size.
    #[error("deferprof does not read the deferpool of {0} yet (1.18 to 1.27)")]
    Release(String),
    /// The runtime has another shape than any release seen.
    #[error("the runtime's {function} does not call {callee} as it is known to")]
    Shape {
        /// The function looked at.
        function: String,
        /// What was looked for.
        callee: &'static str,
    },
}

/// Offsets by first release, for binaries without DWARF (from that of every release from 1.18 on; equal
/// on both architectures).
const LOCAL_POOLS: [(u16, u64, u64); 4] =
    [(18, 208, 104), (23, 208, 96), (25, 200, 96), (26, 208, 104)];

fn local_pool(release: Release, members: &Members) -> Option<LocalPool> {
    let (_, p, pool) = LOCAL_POOLS
        .iter()
        .rfind(|(first, ..)| *first <= release.minor)?;
    Some(LocalPool {
        m: members.offset("runtime.g.m").unwrap_or(48),
        p: members.offset("runtime.m.p").unwrap_or(*p),
        pool: members.offset("runtime.p.deferpool").unwrap_or(*pool),
        capacity: 32,
    })
}

/// Finds the probes.
pub(crate) fn pool(
    image: &Image<'_>,
    module: &Module<'_>,
    release: Release,
    members: &Members,
) -> Result<PoolProbes, PoolUnavailable> {
    let local = local_pool(release, members)
        .filter(|_| !release.is_newer_than_known())
        .ok_or_else(|| PoolUnavailable::Release(release.to_string()))?;
    Search { image, module }.probes(local)
}

impl Search<'_, '_> {
    fn probes(&self, local: LocalPool) -> Result<PoolProbes, PoolUnavailable> {
        let decoded = self.functions(&[&TAKERS, &GIVERS]);
        let named = |names: &'static [&str]| {
            let runs = move |d: &&Decoded| names.contains(&d.name.as_str());
            decoded.iter().filter(runs)
        };
        let mut probes = Vec::new();
        let mut lock = None;
        for function in named(&TAKERS) {
            let asked: Vec<usize> = self.calls(function, &["lock2", "lock", "lockWithRank"]);
            let [asked] = asked[..] else {
                if asked.is_empty() && function.name != "newdefer" {
                    continue; // It calls newdefer.
                }
                return Err(shape(function, "lock2"));
            };
            let unlocked = self.calls(function, &["unlock2", "unlock", "unlockWithRank"]);
            let [unlocked] = unlocked[..] else {
                return Err(shape(function, "unlock2"));
            };
            let allocated = self.calls(function, &["newobject"]);
            let [allocated] = allocated[..] else {
                return Err(shape(function, "newobject"));
            };
            lock = lock.or(self.argument(function, asked));
            let after = self.emulated_after(function, unlocked).unwrap_or(unlocked);
            for (index, event) in [(after, PoolEvent::Asked), (allocated, PoolEvent::Miss)] {
                probes.push(PoolProbe {
                    point: self.probe(function, index)?,
                    event,
                    callers: self.callers(&decoded, function, index),
                });
            }
        }
        if probes.is_empty() {
            return Err(absent("newdefer"));
        }
        let takes = probes.len();
        for function in named(&GIVERS) {
            let of_its_own = matches!(function.name.as_str(), "freedefer" | "popDefer");
            for index in self.calls(function, &["lock2", "lock", "lockWithRank"]) {
                let locked = self.argument(function, index);
                if of_its_own || (locked.is_some() && locked == lock) {
                    probes.push(PoolProbe {
                        point: self.probe(function, index)?,
                        event: PoolEvent::Spill,
                        callers: Vec::new(),
                    });
                }
            }
        }
        if probes.len() == takes {
            return Err(absent("freedefer"));
        }
        Ok(PoolProbes { probes, local })
    }

    /// The address in the first argument register of a call, where it is set right before.
    fn argument(&self, function: &Decoded, call: usize) -> Option<u64> {
        let register = self.image.architecture.conventions().first_argument;
        let mut added = 0i64;
        for index in (call.saturating_sub(4)..call).rev() {
            match function.code.instructions.get(index)?.op {
                Op::Set(to, value) if to == register => {
                    return Some(value.wrapping_add_signed(added));
                }
                Op::Add(to, from, constant) if to == register && from == register => {
                    added = added.wrapping_add(constant);
                }
                _ => {}
            }
        }
        None
    }

    /// The first emulated instruction behind a call in its block, so that the trap is not taken
    /// with the lock held.
    fn emulated_after(&self, function: &Decoded, call: usize) -> Option<usize> {
        let end = function.code.block_of(call)?.end;
        (call + 1..end).find(|index| {
            let instruction = function.code.instructions.get(*index);
            instruction.is_some_and(Instruction::takes_cheap_probe)
        })
    }

    fn probe(&self, function: &Decoded, index: usize) -> Result<ProbePoint, PoolUnavailable> {
        self.point(function, index)
            .ok_or_else(|| shape(function, "it where it can be probed"))
    }

    /// Every way on which a site got to the instruction.
    fn callers(&self, decoded: &[Decoded], function: &Decoded, index: usize) -> Vec<Caller> {
        let Some(own) = self.frame(function, index) else {
            return Vec::new();
        };
        if REGISTERING.contains(&function.name.as_str()) {
            return vec![Caller::Site(own.return_address)];
        }
        let registering = decoded
            .iter()
            .filter(|d| REGISTERING.contains(&d.name.as_str()));
        registering
            .flat_map(|caller| {
                let calls = self.calls(caller, &[&function.name]);
                calls.into_iter().filter_map(move |call| {
                    let returns_to = caller.code.instructions.get(call + 1)?.address;
                    let outer = self.frame(caller, call)?;
                    Some(Caller::Through {
                        via: own.return_address,
                        returns_to,
                        site: own.caller_sp.checked_add(outer.return_address)?,
                    })
                })
            })
            .collect()
    }
}

fn shape(function: &Decoded, callee: &'static str) -> PoolUnavailable {
    PoolUnavailable::Shape {
        function: function.name.clone(),
        callee,
    }
}

fn absent(name: &str) -> PoolUnavailable {
    PoolUnavailable::Shape {
        function: name.to_owned(),
        callee: "lock2",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_release_has_its_own_offsets() {
        let none = Members::default();
        let local = |minor| local_pool(Release { minor }, &none);
        let at = |minor| local(minor).map(|local| (local.p, local.pool));
        assert_eq!(at(17), None);
        assert_eq!(at(18), Some((208, 104)));
        assert_eq!(at(22), Some((208, 104)));
        assert_eq!(at(24), Some((208, 96)));
        assert_eq!(at(25), Some((200, 96)));
        assert_eq!(at(27), Some((208, 104)));
    }
}
