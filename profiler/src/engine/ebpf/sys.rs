//! Every raw system call of the eBPF engine: `bpf(2)` and `perf_event_open(2)`.
//!
//! Each function is safe to call: descriptors are borrowed, and a map knows the sizes of its keys
//! and values, so no call can make the kernel write past a buffer. Layouts and numbers are those of
//! include/uapi/linux/bpf.h and perf_event.h; structures are as long as the oldest kernel that has
//! the command needs, since the kernel takes a shorter one for zeros.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use aya_obj::generated::{
    bpf_attach_type::{BPF_PERF_EVENT, BPF_TRACE_UPROBE_MULTI},
    bpf_cmd::{self, *},
    bpf_insn, bpf_prog_info,
    bpf_prog_type::BPF_PROG_TYPE_KPROBE,
};
use nix::{libc, unistd::Pid};

/// The errno of "not supported" inside the kernel, which bpf(2) lets out; libc has no name for it.
pub(super) const ENOTSUPP: i32 = 524;

/// Room for what the verifier says about a program that it refuses. Before Linux 6.4 a text that
/// does not fit hides the reason.
const LOG_BYTES: usize = 1024 * 1024;

/// Runs `bpf(command, attribute)` and returns what it returned.
///
/// # Safety
///
/// `A` must be the layout of `union bpf_attr` for `command`, without padding bytes, and every
/// pointer in it must be valid for what the command does with it.
unsafe fn bpf<A>(command: bpf_cmd, attribute: &mut A) -> io::Result<i32> {
    // SAFETY: the caller vouches for the attribute; its size is passed along.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attribute),
            size_of::<A>(),
        )
    };
    outcome(result)
}

/// The result of a system call. nix would turn an errno it has no name for, [`ENOTSUPP`], into 0.
fn outcome(result: libc::c_long) -> io::Result<i32> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

/// Takes ownership of a descriptor that a system call has just returned.
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the callers below pass the new descriptor that the kernel returned and keep no copy.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn address<T: ?Sized>(of: &T) -> u64 {
    std::ptr::from_ref(of).cast::<u8>() as u64
}

fn address_mut<T: ?Sized>(of: &mut T) -> u64 {
    std::ptr::from_mut(of).cast::<u8>() as u64
}

/// The 16 bytes that maps and programs have for a name (Linux 4.15).
fn object_name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(15)) {
        *to = if from.is_ascii_alphanumeric() {
            from
        } else {
            b'_'
        };
    }
    bytes
}

/// A BPF map, and how long its keys and values are.
#[derive(Debug)]
pub(super) struct Map {
    fd: OwnedFd,
    key_size: usize,
    /// As user space sees it: of a per-CPU map all the CPUs' values.
    value_size: usize,
}

/// What a map is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct MapSpec<'a> {
    /// Shown by bpftool.
    pub(super) name: &'a str,
    /// `BPF_MAP_TYPE_…`
    pub(super) kind: u32,
    /// Bytes.
    pub(super) key_size: u32,
    /// Bytes, on one CPU.
    pub(super) value_size: u32,
    /// Bytes as user space reads it.
    pub(super) read_size: usize,
    /// Entries.
    pub(super) max_entries: u32,
    /// `BPF_F_…`
    pub(super) flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    fd: u32,
    pad: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

impl Map {
    /// Makes a map.
    pub(super) fn create(spec: &MapSpec<'_>) -> io::Result<Self> {
        #[repr(C)]
        struct Attr {
            kind: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            flags: u32,
            inner_fd: u32,
            numa_node: u32,
            name: [u8; 16],
        }
        let mut attr = Attr {
            kind: spec.kind,
            key_size: spec.key_size,
            value_size: spec.value_size,
            max_entries: spec.max_entries,
            flags: spec.flags,
            inner_fd: 0,
            numa_node: 0,
            name: object_name(spec.name),
        };
        // SAFETY: the layout is BPF_MAP_CREATE's up to the name, and holds no pointers.
        let fd = unsafe { bpf(BPF_MAP_CREATE, &mut attr) }?;
        Ok(Self {
            fd: owned(fd),
            key_size: spec.key_size as usize,
            value_size: spec.read_size,
        })
    }

    /// Its descriptor.
    pub(super) fn raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    fn element<'a>(&self, key: &'a [u8], value: &'a mut [u8], value_size: usize) -> ElementAttr {
        assert_eq!(key.len(), self.key_size, "the key has the map's key size");
        assert_eq!(value.len(), value_size, "the buffer has the map's size");
        ElementAttr {
            fd: self.raw_fd() as u32,
            pad: 0,
            key: address(key),
            value: address_mut(value),
            flags: 0,
        }
    }

    /// Reads the value of `key`; `None` if it has none.
    pub(super) fn lookup(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; self.value_size];
        Ok(self.lookup_into(key, &mut value)?.then_some(value))
    }

    /// Reads the value of `key` into `value`; false if it has none.
    pub(super) fn lookup_into(&self, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
        let mut attr = self.element(key, value, self.value_size);
        // SAFETY: the layout is BPF_MAP_*_ELEM's; `element` checked that key and value are as
        // long as the kernel takes them to be.
        found(unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) })
    }

    /// How many bytes [`Map::lookup_into`] writes.
    pub(super) fn value_size(&self) -> usize {
        self.value_size
    }

    /// Writes into `next` the key that follows `key`, or the first one; false after the last.
    pub(super) fn next_key(&self, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
        let mut attr = self.element(key.unwrap_or(&vec![0; self.key_size]), next, self.key_size);
        if key.is_none() {
            attr.key = 0;
        }
        // SAFETY: as in `lookup_into`; the kernel writes one key. A null key asks for the first.
        found(unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) })
    }

    /// Sets the value of `key`.
    pub(super) fn update(&self, key: &[u8], mut value: Vec<u8>) -> io::Result<()> {
        let mut attr = self.element(key, &mut value, self.value_size);
        // SAFETY: as in `lookup_into`; the kernel only reads.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }?;
        Ok(())
    }

    /// Makes it read-only for system calls (Linux 5.2): the verifier then takes its values for
    /// constants.
    pub(super) fn freeze(&self) -> io::Result<()> {
        let mut attr = self.raw_fd() as u32;
        // SAFETY: BPF_MAP_FREEZE takes the descriptor alone.
        unsafe { bpf(BPF_MAP_FREEZE, &mut attr) }?;
        Ok(())
    }
}

fn found(result: io::Result<i32>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Loads a program of type KPROBE, which uprobes use. With `multi` it can be attached by
/// [`link_uprobe_multi`] (Linux 6.6), else to perf events. If the verifier refuses it the second
/// field of the error is what it said.
pub(super) fn load_program(
    name: &str,
    instructions: &[bpf_insn],
    license: &CStr,
    multi: bool,
) -> Result<OwnedFd, (io::Error, String)> {
    #[repr(C)]
    struct Attr {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        expected_attach_type: u32,
    }
    let mut log = Vec::new();
    loop {
        let mut attr = Attr {
            kind: BPF_PROG_TYPE_KPROBE as u32,
            count: instructions.len() as u32,
            instructions: address(instructions),
            license: address(license),
            log_level: u32::from(!log.is_empty()),
            log_size: log.len() as u32,
            log: if log.is_empty() {
                0
            } else {
                address_mut(log.as_mut_slice())
            },
            kernel_version: 0,
            flags: 0,
            name: object_name(name),
            ifindex: 0,
            expected_attach_type: if multi {
                BPF_TRACE_UPROBE_MULTI as u32
            } else {
                0
            },
        };
        // SAFETY: the layout is BPF_PROG_LOAD's up to the attach type; instructions and licence
        // are read, the log is written, each within the length given.
        match unsafe { bpf(BPF_PROG_LOAD, &mut attr) } {
            Ok(fd) => return Ok(owned(fd)),
            // Writing a log costs time, so only a second try asks for one. The verifier itself
            // says EACCES, never EPERM.
            Err(error) if log.is_empty() && error.raw_os_error() != Some(libc::EPERM) => {
                log = vec![0; LOG_BYTES];
            }
            Err(error) => {
                let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
                let text = log.get(..end).unwrap_or_default();
                return Err((error, String::from_utf8_lossy(text).into_owned()));
            }
        }
    }
}

/// Whether the kernel said no for lack of a capability, a security module or a seccomp filter.
pub(super) fn is_permission(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

/// How often the kernel left the program out because it was running on that CPU already
/// (`recursion_misses`, Linux 5.12; 0 on older kernels).
pub(super) fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<u64> {
    #[repr(C)]
    struct Attr {
        fd: u32,
        length: u32,
        info: u64,
    }
    const INDEX: usize = std::mem::offset_of!(bpf_prog_info, recursion_misses) / 8;
    let mut info = [0_u64; INDEX + 1];
    let mut attr = Attr {
        fd: program.as_raw_fd() as u32,
        length: size_of_val(&info) as u32,
        info: address_mut(&mut info),
    };
    // SAFETY: the layout is BPF_OBJ_GET_INFO_BY_FD's; the kernel writes at most `length` bytes,
    // and all the array lengths in `info` are 0, so that it follows none of its pointers.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info[INDEX])
}

/// Attaches `program` at all the `offsets` of the file at `path`, each hit with its cookie, for the
/// thread group `pid` (Linux 6.6). Closing the link detaches them all.
pub(super) fn link_uprobe_multi(
    program: BorrowedFd<'_>,
    path: &CStr,
    offsets: &[u64],
    cookies: &[u64],
    pid: Pid,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        program: u32,
        target: u32,
        attach_type: u32,
        link_flags: u32,
        path: u64,
        offsets: u64,
        ref_counter_offsets: u64,
        cookies: u64,
        count: u32,
        flags: u32,
        pid: u32,
        pad: u32,
    }
    assert_eq!(offsets.len(), cookies.len(), "each probe has a cookie");
    let mut attr = Attr {
        program: program.as_raw_fd() as u32,
        target: 0,
        attach_type: BPF_TRACE_UPROBE_MULTI as u32,
        link_flags: 0,
        path: address(path),
        offsets: address(offsets),
        ref_counter_offsets: 0,
        cookies: address(cookies),
        count: offsets.len() as u32,
        flags: 0,
        pid: pid.as_raw() as u32,
        pad: 0,
    };
    // SAFETY: the layout is BPF_LINK_CREATE's for uprobe_multi; the kernel reads the path to its
    // 0 byte and `count` elements of both arrays.
    unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.map(owned)
}

/// Opens a uprobe on the instruction at `offset` of the file at `path`, for the thread group
/// `pid`. `kind` is the number in /sys/bus/event_source/devices/uprobe/type (Linux 4.17).
pub(super) fn open_uprobe(kind: u32, path: &CStr, offset: u64, pid: Pid) -> io::Result<OwnedFd> {
    let attr = PerfAttr {
        kind,
        path: address(path),
        offset,
        ..PerfAttr::default()
    };
    // SAFETY: the kernel reads the path in it to its 0 byte.
    unsafe { open_event(attr, pid) }
}

/// Opens the trace event of that number, for the thread group `pid`.
pub(super) fn open_tracepoint(number: u64, pid: Pid) -> io::Result<OwnedFd> {
    const PERF_TYPE_TRACEPOINT: u32 = 2;
    let attr = PerfAttr {
        kind: PERF_TYPE_TRACEPOINT,
        config: number,
        // Any period: a program that returns 0 keeps the event from sampling.
        sample_period: 1,
        ..PerfAttr::default()
    };
    // SAFETY: there are no pointers in it.
    unsafe { open_event(attr, pid) }
}

/// `struct perf_event_attr`, PERF_ATTR_SIZE_VER1.
#[repr(C)]
#[derive(Default)]
struct PerfAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    path: u64,
    offset: u64,
}

/// # Safety
///
/// Pointers in the attribute must be valid for what the kernel does with its kind of event.
unsafe fn open_event(mut attr: PerfAttr, pid: Pid) -> io::Result<OwnedFd> {
    const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
    attr.size = size_of::<PerfAttr>() as u32;
    // SAFETY: the attribute is as long as its size field says; the caller vouches for the rest.
    let result = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attr,
            pid.as_raw(),
            -1_i32,
            -1_i32,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    outcome(result).map(owned)
}

/// Attaches `program` to a perf event and lets the event report (Linux 4.1). It stays attached as
/// long as the event is open.
pub(super) fn set_program(event: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    // _IOW('$', 8, __u32) and _IO('$', 0), include/uapi/linux/perf_event.h.
    const PERF_EVENT_IOC_SET_BPF: libc::Ioctl = 0x4004_2408;
    const PERF_EVENT_IOC_ENABLE: libc::Ioctl = 0x2400;
    let event = event.as_raw_fd();
    // SAFETY: both requests take a number.
    outcome(unsafe { libc::ioctl(event, PERF_EVENT_IOC_SET_BPF, program.as_raw_fd()) }.into())?;
    // SAFETY: as above.
    outcome(unsafe { libc::ioctl(event, PERF_EVENT_IOC_ENABLE, 0) }.into())?;
    Ok(())
}

/// Attaches `program` to a perf event, each hit with `cookie` (Linux 5.15). The link holds the
/// event, whose own descriptor may be closed; closing the link detaches.
pub(super) fn link_perf_event(
    program: BorrowedFd<'_>,
    event: BorrowedFd<'_>,
    cookie: u64,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
        cookie: u64,
    }
    let mut attr = Attr {
        program: program.as_raw_fd() as u32,
        target: event.as_raw_fd() as u32,
        attach_type: BPF_PERF_EVENT as u32,
        flags: 0,
        cookie,
    };
    // SAFETY: the layout is BPF_LINK_CREATE's for perf events, and holds no pointers.
    unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.map(owned)
}

/// The path at which the kernel finds the file behind a descriptor of ours, even if it was deleted
/// or replaced since.
pub(super) fn path_of(file: BorrowedFd<'_>) -> CString {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    CString::new(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_to_what_the_kernel_takes() {
        assert_eq!(&object_name(".rodata")[..8], b"_rodata\0");
        assert_eq!(&object_name("0123456789abcdefgh"), b"0123456789abcde\0");
    }
}
