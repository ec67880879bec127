//! Makes a vCPU leave the guest at once, without a signal handler.
//!
//! A signal reaches a thread that runs a guest even where no handler is installed, if it is blocked
//! in the thread and let in by KVM for the time of `KVM_RUN` alone (`KVM_SET_SIGNAL_MASK`): KVM then
//! returns `EINTR`, and the signal, blocked again, is still pending and never delivered. The thread
//! takes it back with `sigtimedwait`. A kick that comes before `KVM_RUN` stays pending and makes
//! that `KVM_RUN` return without entering the guest, so none is lost. The disposition of the signal,
//! which belongs to the process, is neither changed nor relied on.
//!
//! The signal is `SIGSTKFLT`, which Linux on x86 names and never sends (signal(7)). It is no real-time
//! signal: those are queued, and refused when the user's queue is full (`RLIMIT_SIGPENDING`).
#![allow(unsafe_code, reason = "signal masks, and an ioctl that kvm-ioctls does not have")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

use kvm_bindings::{KVMIO, kvm_signal_mask};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::thread::Thread;

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// The kernel's signal set, a word, where glibc's has sixteen.
type KernelSignalSet = u64;

/// The signal that kicks.
pub(crate) const SIGNAL: libc::c_int = libc::SIGSTKFLT;

/// What `KVM_SET_SIGNAL_MASK` takes: [`kvm_signal_mask`] with its set.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; size_of::<KernelSignalSet>()],
}

/// The signals that a thread's own faults raise. They are never blocked.
const FAULTS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];

/// Runs `spawn`, which starts a thread, with every signal blocked, so that the thread starts with
/// them blocked: no kick can come too early, and the signals of the process stay with the threads
/// of whoever embeds us.
pub(crate) fn with_signals_blocked<T>(spawn: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` initialises `all`, and `pthread_sigmask` reads it and initialises
    // `before`; it cannot fail with a valid `how`.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        for fault in FAULTS {
            libc::sigdelset(all.as_mut_ptr(), fault);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = spawn();
    // SAFETY: `before` was initialised above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    result
}

/// Has KVM let the kick in while `vcpu` runs, and of the other signals only what is never blocked.
pub(crate) fn admit_while_running(vcpu: &VcpuFd) -> io::Result<()> {
    let admitted = FAULTS.into_iter().chain([SIGNAL]);
    let blocked = admitted.fold(KernelSignalSet::MAX, |set, signal| set & !(1 << (signal - 1)));
    let mask = SignalMask { len: size_of::<KernelSignalSet>() as u32, set: blocked.to_ne_bytes() };
    // SAFETY: the argument has the layout that the ioctl reads: a length and so many bytes.
    let done = unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes back the kicks that made `KVM_RUN` return. To be called in the kicked thread.
pub(crate) fn consume() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `sigemptyset` initialises the set; the pointers are valid for the calls. It ends with
    // `EAGAIN` when none is pending.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), SIGNAL);
        while libc::sigtimedwait(set.as_ptr(), ptr::null_mut(), &now) > 0 {}
    }
}

/// Kicks a vCPU thread, which was spawned in [`with_signals_blocked`]. Harmless where it has ended.
pub(crate) fn send(thread: &Thread) {
    // It cannot fail: the signal and the thread are valid, and only real-time signals can be refused.
    // SAFETY: the handle is borrowed, so the thread has been neither joined nor detached, and its
    // id is valid. The signal is blocked in it from its first instruction on.
    unsafe { libc::pthread_kill(thread.id(), SIGNAL) };
}
