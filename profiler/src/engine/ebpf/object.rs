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
use deferprof_ebpf_common::{Cookie, Role, name, pool::PoolOutcome};
use deferprof_symbols::Probe;

use super::{
    pool,
    sys::{self, Map, MapSpec},
};
use crate::engine::{
    EngineError,
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
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    /// The thread group to count.
    pub(super) tgid: u32,
    /// How many sites.
    pub(super) sites: u32,
    /// How many stacks; `None` loads the program that takes none.
    pub(super) stacks: Option<u32>,
    /// For a uprobe_multi link, or for perf events.
    pub(super) multi: bool,
    /// How many probes the program tells apart by their address; 0 if by the kernel's cookie.
    pub(super) addresses: u32,
    /// Also load the program on the runtime's rare paths.
    pub(super) pool: Option<pool::Sizes>,
}

/// The maps by name, and the programs that use them.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) maps: HashMap<&'static str, Map>,
    pub(super) program: OwnedFd,
    /// The one on the runtime's rare paths, if it was wanted.
    pub(super) pool: Option<OwnedFd>,
}

impl Loaded {
    /// Tells the program where each probe is, for kinds of links that have no cookies.
    pub(super) fn know(&self, addresses: &[u64], probes: &[Probe]) -> Result<(), EngineError> {
        let tell = || -> io::Result<()> {
            for (address, probe) in addresses.iter().zip(probes) {
                let cookie = Cookie::new(Role::Registered, probe.site);
                if let Some(map) = self.maps.get(name::COOKIES) {
                    map.update(&address.to_ne_bytes(), cookie.0.to_ne_bytes().to_vec())?;
                }
            }
            Ok(())
        };
        tell().map_err(|error| EngineError::system("tell the eBPF program its probes", error))
    }
}

/// Makes the maps and loads the program.
pub(super) fn load(options: &Options) -> Result<Loaded, EngineError> {
    let (bytes, origin) = object()?;
    let load = |preemptible| load_from(&bytes, &origin, options, preemptible);
    match load(true) {
        // Without BPF_XCHG (before Linux 5.12, on arm64 5.18) programs are not preempted either
        // (that came with 6.0), so they need no claim.
        Err(rejected @ EngineError::Rejected { .. }) if options.stacks.is_some() => {
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

    // Only the programs that are wanted, so that only their maps are needed.
    let count = if options.stacks.is_some() {
        name::COUNT_STACKS
    } else {
        name::COUNT
    };
    let wanted: Vec<_> = std::iter::once(count)
        .chain(options.pool.map(|_| name::POOL_PROGRAM))
        .collect();
    object
        .programs
        .retain(|name, _| wanted.contains(&name.as_str()));
    let mut keys = Vec::new();
    for wanted in &wanted {
        let Some(program) = object.programs.get(*wanted) else {
            return Err(unusable(format!("it has no program `{wanted}`")));
        };
        keys.push(program.function_key());
    }
    let text_sections = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    object
        .functions
        .retain(|function, _| keys.contains(function));

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

    let mut programs = Vec::new();
    for (wanted, key) in wanted.iter().zip(&keys) {
        let mut instructions = object.functions[key].instructions.clone();
        if !preemptible {
            without_exchange(&mut instructions);
        }
        let program = sys::load_program(
            &format!("defer_{wanted}"),
            &instructions,
            &object.license,
            options.multi,
        );
        programs.push(program.map_err(|(error, log)| program_error(wanted, error, &log))?);
    }
    let mut programs = programs.into_iter();
    let Some(program) = programs.next() else {
        return Err(unusable("it has no program".into()));
    };
    let pool = programs.next();
    Ok(Loaded {
        maps,
        program,
        pool,
    })
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
    let by_address = u32::from(options.addresses > 0).to_ne_bytes();
    object.patch_map_data(HashMap::from([
        (name::TGID, (&tgid[..], true)),
        (name::PREEMPTIBLE, (&preemptible[..], true)),
        (name::BY_ADDRESS, (&by_address[..], true)),
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

/// Makes the maps that the wanted program uses.
fn create_maps(
    object: &Object,
    options: &Options,
    unusable: &dyn Fn(String) -> EngineError,
) -> Result<HashMap<&'static str, Map>, EngineError> {
    let stacks = options.stacks.unwrap_or(1);
    // An empty map is no map: there is always room for one.
    let sites = options.sites.max(1);
    let mut sizes = vec![
        (RODATA, None),
        (name::COUNTING, None),
        (name::REGISTERED, Some(sites)),
        (name::EVENTS, None),
        (name::COOKIES, Some(options.addresses.max(1))),
    ];
    if options.stacks.is_some() {
        sizes.extend([
            (name::STACKS, Some(stacks)),
            (name::STACK_COUNTS, Some(stacks)),
            (name::STACKS_LOST, Some(sites)),
            (name::SCRATCH, None),
        ]);
    }
    if let Some(pool) = options.pool {
        sizes.extend([
            (name::POOL_POINTS, Some(pool.points)),
            (name::POOL_SITES, Some(pool.returns)),
            (name::POOL, Some(sites.saturating_mul(PoolOutcome::COUNT))),
            (name::POOL_TOTALS, None),
        ]);
    }
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

    #[test]
    fn an_error_shows_the_end_of_the_verifiers_log() {
        let log: String = (0..100).map(|line| format!("line {line}\n")).collect();
        let error = program_error("count", io::Error::from_raw_os_error(22), &log).to_string();
        assert!(error.ends_with("line 98\nline 99"), "{error}");
        assert!(!error.contains("line 87\n"), "{error}");
    }
}
