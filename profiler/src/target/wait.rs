//! Waiting for what ends a recording: the target's end, a signal to us, or time.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::TargetError;

/// The signals that end a recording in order, read from a descriptor instead of handled.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
    before: SigSet,
}

/// Why [`wait`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The target has ended.
    Ended,
    /// A signal came.
    Signal {
        /// Which.
        signal: Signal,
        /// Whether a process sent it, rather than the terminal.
        by_process: bool,
    },
    /// The time is over.
    Timeout,
}

impl Signals {
    /// Blocks SIGINT, SIGTERM, SIGHUP and SIGQUIT and takes them from now on. Call it before any
    /// thread starts.
    ///
    /// # Errors
    /// [`TargetError::System`].
    pub fn take() -> Result<Self, TargetError> {
        let failed = |error: nix::Error| TargetError::system("take signals", error);
        let mut set = SigSet::empty();
        for signal in [
            Signal::SIGINT,
            Signal::SIGTERM,
            Signal::SIGHUP,
            Signal::SIGQUIT,
        ] {
            set.add(signal);
        }
        let before = SigSet::thread_get_mask().map_err(failed)?;
        set.thread_block().map_err(failed)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let descriptor = SignalFd::with_flags(&set, flags).map_err(failed)?;
        Ok(Self { descriptor, before })
    }

    /// The mask as it was: what a child should get.
    pub fn mask_before(&self) -> &SigSet {
        &self.before
    }

    /// The next signal that has come, if any.
    pub fn next(&self) -> Option<Wake> {
        /// `si_code` of a signal that the kernel itself raised, as a terminal does.
        const SI_KERNEL: i32 = 0x80;
        let info = self.descriptor.read_signal().ok()??;
        let signal = Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()?;
        Some(Wake::Signal {
            signal,
            by_process: info.ssi_code != SI_KERNEL,
        })
    }
}

/// Waits until the process behind `target` (a pidfd) has ended, a signal came, or `timeout` is
/// over. The end of the target is reported first.
///
/// # Errors
/// [`TargetError::System`].
pub fn wait(
    target: Option<BorrowedFd<'_>>,
    signals: &Signals,
    timeout: Duration,
) -> Result<Wake, TargetError> {
    let mut descriptors = vec![PollFd::from_borrowed_fd(
        signals.descriptor.as_fd(),
        PollFlags::IN,
    )];
    descriptors.extend(target.map(|t| PollFd::from_borrowed_fd(t, PollFlags::IN)));
    let limit = Timespec::try_from(timeout).unwrap_or(Timespec {
        tv_sec: i64::MAX,
        tv_nsec: 0,
    });
    match poll(&mut descriptors, Some(&limit)) {
        Ok(0) => return Ok(Wake::Timeout),
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(Wake::Timeout),
        Err(error) => return Err(TargetError::system("wait for the target", error)),
    }
    if descriptors.get(1).is_some_and(|d| !d.revents().is_empty()) {
        return Ok(Wake::Ended);
    }
    Ok(signals.next().unwrap_or(Wake::Timeout))
}
