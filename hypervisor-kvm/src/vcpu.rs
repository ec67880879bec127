//! A processor's thread: runs the guest and carries out what it asks of its devices.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

use instance_core::machine::ExitCause;
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    kvm_regs, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Devices;
use crate::gate::Gate;
use crate::kick;

/// Runs a processor until the machine ends. Returns why, where this processor knows.
///
/// While it stands at the gate it is free to be looked at, and between two instructions.
pub(crate) fn run(
    vcpu: &Mutex<VcpuFd>,
    vm: &kvm_ioctls::VmFd,
    devices: &Devices,
    gate: &Gate,
) -> Option<ExitCause> {
    let lock = || vcpu.lock().unwrap_or_else(PoisonError::into_inner);
    let mut running = lock();
    if let Err(error) = kick::admit_while_running(&running) {
        return Some(ExitCause::HostFailure(format!("KVM did not take a signal mask: {error}")));
    }
    // Whether KVM has an instruction to finish with what a device answered, which it does when the guest next runs.
    let mut unfinished = false;
    loop {
        if !gate.is_open() && !unfinished {
            drop(running);
            if !gate.pass() {
                return None;
            }
            running = lock();
            // The guest's clock has gone on while it stood still, which Linux takes for a processor that
            // hangs, unless it is told. A guest without such a clock has nothing to be told.
            let _ = running.kvmclock_ctrl();
        }
        let vcpu = &mut *running;
        // Finishes the instruction, and no more where the gate is closed.
        vcpu.set_kvm_immediate_exit((!gate.is_open()).into());
        unfinished = false;
        let unexpected = match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                devices.port_read(port, data);
                unfinished = true;
                continue;
            }
            Ok(VcpuExit::IoOut(port, data)) => match devices.port_write(vm, port, data) {
                std::ops::ControlFlow::Break(cause) => return Some(cause),
                std::ops::ControlFlow::Continue(()) => {
                    unfinished = true;
                    continue;
                }
            },
            Ok(VcpuExit::MmioRead(address, data)) => {
                devices.memory_read(address, data);
                unfinished = true;
                continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                devices.memory_write(vm, address, data);
                unfinished = true;
                continue;
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Some(ExitCause::PowerOff),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Some(ExitCause::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                Stopped::Crash("the guest said that it crashed")
            }
            Ok(VcpuExit::Shutdown) => Stopped::Crash("triple fault"),
            Ok(VcpuExit::InternalError) => Stopped::KvmError(internal_error(vcpu)),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Stopped::KvmError(format!("the guest cannot be entered, hardware reason {reason:#x}"))
            }
            Ok(other) => Stopped::KvmError(format!("an exit that is not known: {other:?}")),
            Err(error) => match io::Error::from(error).kind() {
                io::ErrorKind::Interrupted => {
                    kick::consume();
                    continue;
                }
                // A processor that another one is about to start.
                io::ErrorKind::WouldBlock => continue,
                _ => Stopped::KvmError(error.to_string()),
            },
        };
        return Some(unexpected.cause(vcpu));
    }
}

/// Why a processor cannot go on.
enum Stopped {
    Crash(&'static str),
    KvmError(String),
}

impl Stopped {
    /// The cause, with the registers that explain it.
    fn cause(self, vcpu: &VcpuFd) -> ExitCause {
        let at = match (vcpu.get_regs(), vcpu.get_sregs()) {
            (Ok(regs), Ok(sregs)) => Where(regs, sregs).to_string(),
            _ => "at an unknown place".to_owned(),
        };
        match self {
            Self::Crash(how) => ExitCause::Crash(format!("{how} {at}")),
            Self::KvmError(what) => ExitCause::HostFailure(format!("KVM cannot run the guest: {what} {at}")),
        }
    }
}

/// What KVM says of its own failure.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: every bit pattern is a value of these integers, and after this exit KVM has filled them in.
    #[allow(unsafe_code, reason = "a C union")]
    let internal = unsafe { run.__bindgen_anon_1.internal };
    match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            // The data begins with flags, of which the first says that instruction bytes follow: their
            // number and the bytes (`struct kvm_run.emulation_failure`).
            let words = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
            let bytes: Vec<u8> = words.iter().skip(1).flat_map(|w| w.to_le_bytes()).collect();
            match (words.first(), bytes.split_first()) {
                (Some(flags), Some((len, code))) if flags & 1 == 1 => {
                    let code = &code[..usize::from(*len).min(code.len())];
                    format!("it does not know an instruction, which begins {code:02x?},")
                }
                _ => "it does not know an instruction".to_owned(),
            }
        }
        other => format!("internal error {other}"),
    }
}

struct Where(kvm_regs, kvm_sregs);

impl fmt::Display for Where {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(regs, sregs) = self;
        write!(f, "at rip={:#x} (cs base {:#x}), rflags={:#x}, ", regs.rip, sregs.cs.base, regs.rflags)?;
        write!(f, "rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} ", regs.rax, regs.rbx, regs.rcx, regs.rdx)?;
        write!(f, "rsi={:#x} rdi={:#x} rsp={:#x}, ", regs.rsi, regs.rdi, regs.rsp)?;
        write!(f, "cr0={:#x} cr2={:#x} cr3={:#x} ", sregs.cr0, sregs.cr2, sregs.cr3)?;
        write!(f, "cr4={:#x} efer={:#x}", sregs.cr4, sregs.efer)
    }
}
