//! A processor's thread: runs the guest and carries out what it asks of its devices.

use std::io;
use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use instance_core::machine::{ExitCause, ProcessorError, ProcessorErrorReason as Reason, X86Registers};
use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    kvm_regs, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Devices;
use crate::exits::Exits;
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
    exits: &Exits,
) -> Option<ExitCause> {
    let lock = || vcpu.lock().unwrap_or_else(PoisonError::into_inner);
    let mut running = lock();
    if let Err(error) = kick::admit_while_running(&running) {
        return Some(ExitCause::HostFailure(format!("KVM did not take a signal mask: {error}")));
    }
    // A restored machine's may have been left by the one that was saved.
    devices.go_on(vm, gate);
    // Whether KVM has an instruction to finish with what a device answered, which it does when the guest next runs.
    let mut unfinished = false;
    loop {
        if !gate.is_open() && !unfinished {
            drop(running);
            if !gate.pass() {
                return None;
            }
            devices.go_on(vm, gate);
            running = lock();
            // The guest's clock has gone on while it stood still, which Linux takes for a processor that
            // hangs, unless it is told. A guest without such a clock has nothing to be told.
            let _ = running.kvmclock_ctrl();
        }
        let vcpu = &mut *running;
        // Finishes the instruction, and no more where the gate is closed.
        vcpu.set_kvm_immediate_exit((!gate.is_open()).into());
        unfinished = false;
        let reason = match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.port_reads.add();
                devices.port_read(port, data);
                unfinished = true;
                continue;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.port_writes.add();
                match devices.port_write(vm, gate, port, data) {
                    ControlFlow::Break(cause) => return Some(cause),
                    ControlFlow::Continue(()) => {}
                }
                unfinished = true;
                continue;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.memory_reads.add();
                devices.memory_read(address, data);
                unfinished = true;
                continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.memory_writes.add();
                devices.memory_write(vm, gate, address, data);
                unfinished = true;
                continue;
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Some(ExitCause::PowerOff),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Some(ExitCause::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => return Some(ExitCause::Panic),
            Ok(VcpuExit::Shutdown) => return Some(ExitCause::TripleFault(registers(vcpu).map(Box::new))),
            Ok(VcpuExit::InternalError) => internal_error(vcpu),
            Ok(VcpuExit::FailEntry(reason, _)) => Reason::EntryRefused(reason),
            Ok(other) => Reason::UnknownExit(format!("{other:?}")),
            Err(error) => match io::Error::from(error).kind() {
                io::ErrorKind::Interrupted => {
                    exits.interruptions.add();
                    kick::consume();
                    continue;
                }
                // A processor that another one is about to start.
                io::ErrorKind::WouldBlock => {
                    exits.others.add();
                    continue;
                }
                _ => Reason::RunFailed(error.errno()),
            },
        };
        exits.others.add();
        return Some(ExitCause::ProcessorError(Box::new(ProcessorError::new(reason, registers(vcpu)))));
    }
}

/// What KVM says of its own failure.
fn internal_error(vcpu: &mut VcpuFd) -> Reason {
    let run = vcpu.get_kvm_run();
    // SAFETY: every bit pattern is a value of these integers, and after this exit KVM has filled them in.
    #[allow(unsafe_code, reason = "a C union")]
    let internal = unsafe { run.__bindgen_anon_1.internal };
    match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            let words = &internal.data[..(internal.ndata as usize).min(internal.data.len())];
            Reason::UnknownInstruction(instruction(words).unwrap_or_default())
        }
        other => Reason::Internal(other),
    }
}

/// The bytes of the instruction that KVM's emulator failed at. What it tells begins with flags, of which the
/// first says that their number and the bytes follow (`struct kvm_run.emulation_failure`).
fn instruction(words: &[u64]) -> Option<Vec<u8>> {
    let (flags, rest) = words.split_first()?;
    let bytes: Vec<u8> = rest.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (len, code) = bytes.split_first()?;
    (flags & 1 == 1).then(|| code[..usize::from(*len).min(code.len())].to_vec())
}

/// Where a processor is, as far as KVM tells.
fn registers(vcpu: &VcpuFd) -> Option<X86Registers> {
    Some(told(&vcpu.get_regs().ok()?, &vcpu.get_sregs().ok()?))
}

fn told(regs: &kvm_regs, sregs: &kvm_sregs) -> X86Registers {
    let mut told = X86Registers::default();
    (told.rip, told.rflags) = (regs.rip, regs.rflags);
    told.general = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    (told.cs, told.cs_base) = (sregs.cs.selector, sregs.cs.base);
    (told.cr0, told.cr2, told.cr3, told.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
    told.efer = sregs.efer;
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_is_as_long_as_kvm_says_and_knows() {
        let words = |code: [u8; 16]| {
            let (low, high) = code.split_at(8);
            [low, high].map(|half| u64::from_le_bytes(half.try_into().unwrap()))
        };
        let [low, high] = words([3, 0x0f, 0x0b, 0xcc, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        for (told, expect) in [
            (vec![1, low, high], Some(vec![0x0f, 0x0b, 0xcc])),
            (vec![0, low, high], None),
            (
                vec![1, low | 0xff, high],
                Some([&[0x0f, 0x0b, 0xcc][..], &(4..=15).collect::<Vec<u8>>()].concat()),
            ),
            (vec![1, low & !0xff, high], Some(vec![])),
            (vec![1], None),
            (vec![], None),
        ] {
            assert_eq!(instruction(&told), expect, "{told:x?}");
        }
    }
}
