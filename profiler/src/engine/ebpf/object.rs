//! From the object file with the eBPF programs to maps and a program in the kernel.
//!
//! The object is built by scripts/build-ebpf and embedded. aya-obj parses it and patches
//! descriptors in; the maps and the program are made with our own calls, because aya as of 0.14
//! cannot load a program for uprobe_multi links.

use std::{
    borrow::Cow,
    collections::HashMap,
    io,
    os::{fd::OwnedFd, linux::fs::MetadataExt as _},
};

use aya_obj::{
    EbpfSectionKind, Object,
    generated::{bpf_insn, bpf_map_type},
};
use deferprof_ebpf_common::{Several, latency::Time, name, pool::PoolOutcome, run::RunPath};

use super::{
    latency,
    points::{Placed, Points},
    pool, run,
    sys::{self, Map, MapSpec},
};
use crate::engine::{
    EngineError, Request, Taxes,
    error::Capability::{self, Bpf, Perfmon, SysResource},
    setting,
};

/// The object of this architecture, aligned as its parser wants it.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

#[cfg(target_arch = "x86_64")]
static PREBUILT: &Aligned<[u8]> = &Aligned(*include_bytes!(
    "../../../../ebpf/prebuilt/deferprof-x86_64.o"
));
#[cfg(target_arch = "aarch64")]
static PREBUILT: &Aligned<[u8]> = &Aligned(*include_bytes!(
    "../../../../ebpf/prebuilt/deferprof-aarch64.o"
));
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("deferprof's eBPF programs are built for x86-64 and arm64 only");

/// Names a file to use instead of the embedded object: for those who change ebpf/.
const OBJECT_VARIABLE: &str = "DEFERPROF_EBPF_OBJECT";

/// Loading a program of this type takes both since Linux 5.8 (kernel/bpf/syscall.c).
pub(super) const NEEDED: &[Capability] = &[Bpf, Perfmon];

/// How many lines of the verifier's log an error shows.
const LOG_LINES: usize = 12;

/// What to load.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Options {
    /// The thread group to count.
    tgid: u32,
    /// How many sites.
    sites: u32,
    /// How many stacks; `None` takes none.
    stacks: Option<u32>,
    /// For a uprobe_multi link, or for perf events.
    pub(super) multi: bool,
    /// How many probes the program tells apart by their address; 0 if by the kernel's cookie.
    pub(super) addresses: u32,
    /// How many lists of answers.
    lists: u32,
    /// How many calls of the runtime have a site.
    returns: u32,
    /// How many probes are on rare paths with records.
    pool: u32,
    /// Whether deferred calls are counted.
    ran: bool,
    /// How many probes are in the runtime's loops and at the entries of deferred functions.
    run_points: u32,
    /// How many functions have open-coded defers.
    frames: u32,
    /// Whether records of range-over-func bodies must be remembered.
    records: bool,
    /// What hits cost, if times are measured.
    taxes: Option<Taxes>,
}

impl Options {
    pub(super) fn of(request: &Request<'_>, points: &Points) -> Self {
        let size = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        let more = &request.more;
        let runs = more.runs.and_then(|runs| runs.probes);
        Self {
            tgid: request.pid.as_raw() as u32,
            sites: request.sites,
            stacks: request.stacks.map(std::num::NonZeroU32::get),
            lists: size(points.lists.len()),
            returns: size(more.returns.len()),
            pool: size(more.pool.map_or(0, |pool| pool.probes.len())),
            ran: more.runs.is_some(),
            run_points: size(
                more.runs.map_or(0, |more| more.entries.len())
                    + runs.map_or(0, |runs| runs.probes.len()),
            ),
            frames: size(runs.map_or(0, |runs| runs.frames.len())),
            records: runs.is_some_and(|runs| runs.probes.iter().any(|probe| probe.keeps)),
            taxes: more.latency.map(|latency| latency.taxes),
            ..Self::default()
        }
    }
}

/// The maps by name, and the program that uses them.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) maps: HashMap<&'static str, Map>,
    pub(super) program: OwnedFd,
}

impl Loaded {
    /// Tells the program where each probe is, for kinds of links that have no cookies.
    pub(super) fn know(&self, addresses: &[u64], placed: &[Placed]) -> Result<(), EngineError> {
        let cookies = map(&self.maps, name::COOKIES)?;
        let tell = || -> io::Result<()> {
            for (address, probe) in addresses.iter().zip(placed) {
                cookies.update(
                    &address.to_ne_bytes(),
                    probe.cookie.0.to_ne_bytes().to_vec(),
                )?;
            }
            Ok(())
        };
        tell().map_err(|error| EngineError::system("tell the eBPF program its probes", error))
    }

    /// Tells the program what the probes stand for.
    pub(super) fn fill(&self, request: &Request<'_>, points: &Points) -> Result<(), EngineError> {
        let (lists, sites) = (map(&self.maps, name::LISTS)?, map(&self.maps, name::SITES)?);
        let tell = || -> io::Result<()> {
            for (number, list) in (0u32..).zip(&points.lists) {
                lists.update(&number.to_ne_bytes(), list_bytes(list))?;
            }
            for (address, site) in request.more.returns {
                sites.update(&address.0.to_ne_bytes(), site.to_ne_bytes().to_vec())?;
            }
            Ok(())
        };
        tell().map_err(|error| EngineError::system("tell the eBPF program its sites", error))?;
        if let Some(probes) = request.more.pool {
            pool::fill(&self.maps, probes)?;
        }
        match &request.more.runs {
            Some(runs) => run::fill(&self.maps, runs),
            None => Ok(()),
        }
    }
}

/// A [`Several`] as the map holds it.
fn list_bytes(list: &Several) -> Vec<u8> {
    [list.returned, list.length]
        .into_iter()
        .chain(list.sites)
        .chain([list.exit])
        .flat_map(u32::to_ne_bytes)
        .collect()
}

/// One of the maps.
pub(super) fn map<'a>(
    maps: &'a HashMap<&'static str, Map>,
    name: &'static str,
) -> Result<&'a Map, EngineError> {
    maps.get(name).ok_or_else(|| missing(name))
}

/// Takes one of the maps.
pub(super) fn take(
    maps: &mut HashMap<&'static str, Map>,
    name: &'static str,
) -> Result<Map, EngineError> {
    maps.remove(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> EngineError {
    EngineError::Object {
        origin: "of this session".into(),
        reason: format!("it has no map `{name}`"),
    }
}

/// Makes the maps and loads the program.
pub(super) fn load(options: &Options) -> Result<Loaded, EngineError> {
    let (bytes, origin) = object()?;
    let load = |preemptible| load_from(&bytes, &origin, options, preemptible);
    match load(true) {
        // Without BPF_XCHG (before Linux 5.12, on arm64 5.18) programs are not preempted either
        // (that came with 6.0), so they need no claim.
        Err(rejected @ EngineError::Rejected { .. }) => {
            // What the verifier says of the full program is what matters if both are refused.
            load(false).map_err(|_| rejected)
        }
        result => result,
    }
}

/// The bytes of the object, and what to call it.
fn object() -> Result<(Cow<'static, [u8]>, String), EngineError> {
    let Some(path) = std::env::var_os(OBJECT_VARIABLE) else {
        return Ok((Cow::Borrowed(&PREBUILT.0), "embedded in deferprof".into()));
    };
    let origin = format!("{} ({OBJECT_VARIABLE})", path.display());
    match std::fs::read(&path) {
        Ok(bytes) => Ok((Cow::Owned(bytes), origin)),
        Err(error) => Err(EngineError::system(format!("read {origin}"), error)),
    }
}

fn load_from(
    bytes: &[u8],
    origin: &str,
    options: &Options,
    preemptible: bool,
) -> Result<Loaded, EngineError> {
    let unusable = |reason: String| EngineError::Object {
        origin: origin.into(),
        reason,
    };
    let mut object = Object::parse(bytes).map_err(|error| unusable(error.to_string()))?;
    set_variables(&mut object, options, preemptible)
        .map_err(|error| unusable(error.to_string()))?;

    let Some(program) = object.programs.get(name::WATCH) else {
        return Err(unusable(format!("it has no program `{}`", name::WATCH)));
    };
    let key = program.function_key();
    let text_sections = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();

    let maps = create_maps(&object, options, &unusable)?;
    let relocations: Vec<_> = maps
        .iter()
        .filter_map(|(name, map)| {
            let (name, definition) = object.maps.get_key_value(*name)?;
            Some((name.clone(), map.raw_fd(), definition.clone()))
        })
        .collect();
    object
        .relocate_maps(
            relocations
                .iter()
                .map(|(name, fd, map)| (name.as_str(), *fd, map)),
            &text_sections,
        )
        .and_then(|()| object.relocate_calls(&text_sections))
        .map_err(|error| unusable(format!("{error}: {:?}", std::error::Error::source(&error))))?;

    let mut instructions = object.functions[&key].instructions.clone();
    if !preemptible {
        without_exchange(&mut instructions);
    }
    let program = sys::load_program(
        &format!("defer_{}", name::WATCH),
        &instructions,
        &object.license,
        options.multi,
    )
    .map_err(|(error, log)| program_error(name::WATCH, error, &log))?;
    Ok(Loaded { maps, program })
}

/// Puts a move of 0 in the place of each BPF_XCHG. Before Linux 5.12 the kernel refuses a program that
/// has one anywhere, also where the constant `PREEMPTIBLE` lets nobody come.
fn without_exchange(instructions: &mut [bpf_insn]) {
    /// BPF_STX | BPF_ATOMIC | BPF_DW, with BPF_XCHG as the immediate: it returns in the source.
    const ATOMIC: u8 = 0xdb;
    const XCHG: i32 = 0xe1;
    /// BPF_ALU64 | BPF_MOV | BPF_K.
    const MOVE: u8 = 0xb7;
    for instruction in instructions {
        if instruction.code == ATOMIC && instruction.imm == XCHG {
            let returned = instruction.src_reg();
            *instruction = bpf_insn {
                code: MOVE,
                _bitfield_align_1: [],
                _bitfield_1: bpf_insn::new_bitfield_1(returned, 0),
                off: 0,
                imm: 0,
            };
        }
    }
}

/// Sets the read-only variables of the programs.
fn set_variables(
    object: &mut Object,
    options: &Options,
    preemptible: bool,
) -> Result<(), aya_obj::ParseError> {
    let (inode, device) = pid_namespace().unwrap_or((0, 0));
    let (tgid, preemptible) = (
        options.tgid.to_ne_bytes(),
        u32::from(preemptible).to_ne_bytes(),
    );
    let (inode, device) = (inode.to_ne_bytes(), device.to_ne_bytes());
    let flag = |set: bool| u32::from(set).to_ne_bytes();
    let (by_address, stacks) = (flag(options.addresses > 0), flag(options.stacks.is_some()));
    let latency = flag(options.taxes.is_some());
    let taxes = options.taxes.unwrap_or(Taxes::NONE);
    let (emulated, stepped) = (
        taxes.emulated_ns.to_ne_bytes(),
        taxes.single_stepped_ns.to_ne_bytes(),
    );
    object.patch_map_data(HashMap::from([
        (name::TGID, (&tgid[..], true)),
        (name::PREEMPTIBLE, (&preemptible[..], true)),
        (name::BY_ADDRESS, (&by_address[..], true)),
        (name::TAKE_STACKS, (&stacks[..], true)),
        (name::LATENCY, (&latency[..], true)),
        (name::TAX_EMULATED, (&emulated[..], true)),
        (name::TAX_STEPPED, (&stepped[..], true)),
        (name::PIDNS_INODE, (&inode[..], true)),
        (name::PIDNS_DEVICE, (&device[..], true)),
    ]))
}

/// Inode and device of our pid namespace, in which the target's number is meant; `None` in the
/// initial one, where the cheaper helper says the same.
fn pid_namespace() -> Option<(u64, u64)> {
    /// `PROC_PID_INIT_INO` (include/linux/proc_ns.h).
    const INITIAL: u64 = 0xefff_fffc;
    let file = std::fs::metadata("/proc/self/ns/pid").ok()?;
    (file.st_ino() != INITIAL).then(|| (file.st_ino(), file.st_dev()))
}

/// Whether this process is in the first pid namespace.
pub(crate) fn in_initial_pid_namespace() -> bool {
    pid_namespace().is_none()
}

/// Makes the maps. The program refers to all of them: those of questions that are not asked are of
/// one entry.
fn create_maps(
    object: &Object,
    options: &Options,
    unusable: &dyn Fn(String) -> EngineError,
) -> Result<HashMap<&'static str, Map>, EngineError> {
    // An empty map is no map: there is always room for one.
    let sites = options.sites.max(1);
    let stacks = options.stacks.unwrap_or(1);
    let if_asked = |asked: bool, size: u32| if asked { size.max(1) } else { 1 };
    let by_site = |asked: bool, each: u32| if_asked(asked, sites.saturating_mul(each));
    let ran = options.ran;
    let latency = options.taxes.is_some();
    let sizes = [
        (RODATA, None),
        (name::COUNTING, None),
        (name::REGISTERED, Some(sites)),
        (name::EVENTS, None),
        (name::COOKIES, Some(options.addresses.max(1))),
        (name::LISTS, Some(options.lists.max(1))),
        (name::SITES, Some(options.returns.max(1))),
        (name::STACKS, Some(stacks)),
        (name::STACK_COUNTS, Some(stacks)),
        (
            name::STACKS_LOST,
            Some(by_site(options.stacks.is_some(), 1)),
        ),
        (name::SCRATCH, None),
        (name::POOL_POINTS, Some(options.pool.max(1))),
        (
            name::POOL,
            Some(by_site(options.pool > 0, PoolOutcome::COUNT)),
        ),
        (name::POOL_TOTALS, None),
        (name::RUN_POINTS, Some(options.run_points.max(1))),
        (name::RUN_LAYOUT, None),
        (name::OPEN_FRAMES, Some(options.frames.max(1))),
        (name::RECORDS, Some(if_asked(options.records, run::RECORDS))),
        (name::RAN, Some(by_site(ran, RunPath::COUNT))),
        (name::RUN_TOTALS, None),
        (
            name::GOROUTINES,
            Some(if_asked(latency, latency::GOROUTINES)),
        ),
        (name::IN_FLIGHT, Some(if_asked(latency, latency::IN_FLIGHT))),
        (name::BUCKETS, Some(if_asked(latency, latency::BUCKETS))),
        (name::SUMS, Some(by_site(latency, Time::COUNT))),
    ];
    let cpus = possible_cpus()?;
    let mut maps = HashMap::new();
    for (name, size) in sizes {
        let definition = object
            .maps
            .get(name)
            .ok_or_else(|| unusable(format!("it has no map `{name}`")))?;
        let per_cpu = [
            bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY as u32,
            bpf_map_type::BPF_MAP_TYPE_PERCPU_HASH as u32,
        ]
        .contains(&definition.map_type());
        let value_size = definition.value_size();
        let map = create_map(&MapSpec {
            name,
            kind: definition.map_type(),
            key_size: definition.key_size(),
            value_size,
            read_size: if per_cpu {
                (value_size as usize).next_multiple_of(8) * cpus
            } else {
                value_size as usize
            },
            max_entries: size.unwrap_or_else(|| definition.max_entries()),
            flags: definition.map_flags(),
        })?;
        if definition.section_kind() == EbpfSectionKind::Rodata {
            map.update(&0_u32.to_ne_bytes(), definition.data().to_vec())
                .and_then(|()| map.freeze())
                .map_err(|error| EngineError::system("fill the eBPF programs' constants", error))?;
        }
        maps.insert(name, map);
    }
    Ok(maps)
}

/// The section that holds the programs' constants.
const RODATA: &str = ".rodata";

fn create_map(spec: &MapSpec<'_>) -> Result<Map, EngineError> {
    let mut result = Map::create(spec);
    if result.as_ref().is_err_and(sys::is_permission) && raise_memlock() {
        // Before Linux 5.11 maps count as locked memory.
        result = Map::create(spec);
    }
    result.map_err(|error| {
        let action = format!(
            "make the eBPF map {} of {} entries",
            spec.name, spec.max_entries
        );
        match error.raw_os_error() {
            Some(nix::libc::ENOSYS) => EngineError::NotSupported {
                action: "run eBPF programs".into(),
                reason: "the kernel was built without CONFIG_BPF_SYSCALL".into(),
            },
            _ if sys::is_permission(&error) && maps_are_locked_memory() => {
                EngineError::not_permitted(action, &[Bpf, Perfmon, SysResource], error)
            }
            _ if sys::is_permission(&error) => EngineError::not_permitted(action, NEEDED, error),
            _ => EngineError::system(action, error),
        }
    })
}

/// Whether this is before Linux 5.11, where RLIMIT_MEMLOCK applies to maps, often 64 KiB.
fn maps_are_locked_memory() -> bool {
    let release = setting("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse::<u32>().ok();
    matches!((next(), next()), (Some(5), Some(..=10)) | (Some(..=4), _))
}

fn raise_memlock() -> bool {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_ok()
}

fn program_error(program: &str, error: io::Error, log: &str) -> EngineError {
    if sys::is_permission(&error) && log.is_empty() {
        let action = format!("load the eBPF program `{program}`");
        return EngineError::not_permitted(action, NEEDED, error);
    }
    let lines: Vec<_> = log.lines().filter(|line| !line.is_empty()).collect();
    let tail = lines
        .get(lines.len().saturating_sub(LOG_LINES)..)
        .unwrap_or_default();
    EngineError::Rejected {
        program: program.into(),
        log: if tail.is_empty() {
            "none given".into()
        } else {
            tail.join("\n")
        },
        source: error,
    }
}

/// How many CPUs the kernel counts for in a per-CPU map: those that can ever be there.
fn possible_cpus() -> Result<usize, EngineError> {
    let path = "/sys/devices/system/cpu/possible";
    std::fs::read_to_string(path)
        .and_then(|text| {
            let unreadable = || format!("it holds {:?}, no list of CPUs", text.trim());
            cpus(text.trim()).ok_or_else(|| io::Error::other(unreadable()))
        })
        .map_err(|error| EngineError::system(format!("read {path}"), error))
}

/// How many CPUs a list such as `0-3,8` names.
fn cpus(list: &str) -> Option<usize> {
    list.split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!(cpus("0"), Some(1));
        assert_eq!(cpus("0-1"), Some(2));
        assert_eq!(cpus("0-3,8,10-11"), Some(7));
        assert_eq!(cpus(""), None);
        assert_eq!(cpus("3-1"), None);
    }

    /// Without the tail call, Linux 6.13 and newer would have runs that preempt one another share a
    /// stack (`keep_own_stack` in ebpf/src/main.rs). It counts in the program's own function.
    #[test]
    fn the_program_has_a_tail_call() {
        /// BPF_JMP | BPF_CALL, with the helper's number as the immediate.
        const CALL: u8 = 0x85;
        const TAIL_CALL: i32 = 12;
        let object = Object::parse(&PREBUILT.0).unwrap();
        let program = &object.programs[name::WATCH];
        let function = &object.functions[&program.function_key()];
        let is_tail_call = |i: &bpf_insn| (i.code, i.src_reg(), i.imm) == (CALL, 0, TAIL_CALL);
        assert!(function.instructions.iter().any(is_tail_call));
    }

    #[test]
    fn an_error_shows_the_end_of_the_verifiers_log() {
        let log: String = (0..100).map(|line| format!("line {line}\n")).collect();
        let error = program_error("count", io::Error::from_raw_os_error(22), &log).to_string();
        assert!(error.ends_with("line 98\nline 99"), "{error}");
        assert!(!error.contains("line 87\n"), "{error}");
    }
}
