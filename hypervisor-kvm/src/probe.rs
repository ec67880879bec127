//! Whether KVM runs a guest's kernel on the processor, or emulates it.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use instance_core::machine::{Execution, MachineError, MachineErrorKind};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{HostContext, Result};
use crate::kernel::Entry;
use crate::{cpu, memory};

/// Where the guest's code is.
const CODE: u32 = 0x1000;
/// `dec ecx; jnz CODE; out 0x80, al`: counts down and tells.
const LOOP: [u8; 5] = [0x49, 0x75, 0xfd, 0xe6, 0x80];
const INSTRUCTIONS_A_TURN: u64 = 2;
/// Turns of the first runs, each of which an emulator finishes in some ten milliseconds.
const FEW: u64 = 4_000;
/// Turns of the last runs, where a first one was fast: some hundred microseconds on a processor.
const MANY: u64 = 400_000;
/// Emulators in KVM do about a million instructions a second. The slowest hardware, a processor with
/// nested virtualisation that is itself emulated, does more than a hundred million.
const HARDWARE: f64 = 20e6;

/// Runs a short loop in a guest's most privileged mode.
pub(crate) fn measure(device: &kvm_ioctls::Kvm) -> Result<Execution> {
    let memory = memory::allocate(NonZeroU32::MIN)?;
    memory.write_slice(&LOOP, GuestAddress(CODE.into())).host("no memory for the measurement")?;
    let vm = device.create_vm().host("KVM did not make a virtual machine")?;
    // SAFETY: the memory is declared before the virtual machine and its processor, and dropped after them.
    #[allow(unsafe_code, reason = "the guest's memory is given to KVM")]
    unsafe {
        memory::register(&vm, &memory)?;
    }
    let mut vcpu = vm.create_vcpu(0).host("KVM did not make a processor")?;
    cpu::start_at(&vcpu, Entry::Pvh(CODE))?;
    let mut fastest = 0f64;
    // The first run of each kind also pays for what is set up when it is first needed, and any run may be
    // held up by a busy host: one fast run tells of hardware, several slow ones of an emulator.
    for turns in [FEW, FEW, FEW, FEW, FEW, MANY, MANY, MANY] {
        let promising = fastest >= HARDWARE / 4.0;
        if promising != (turns == MANY) {
            continue;
        }
        let took = run(&mut vcpu, turns)?;
        fastest = fastest.max((turns * INSTRUCTIONS_A_TURN) as f64 / took.as_secs_f64());
    }
    let speed = format!("guest kernel code runs at {} instructions/s", rounded(fastest));
    Ok(match fastest >= HARDWARE {
        true => Execution::Hardware { measured: speed },
        false => Execution::Emulated { measured: format!("{speed}: this host's KVM emulates it") },
    })
}

fn run(vcpu: &mut VcpuFd, turns: u64) -> Result<Duration> {
    let mut regs = vcpu.get_regs().host("KVM did not tell a processor's registers")?;
    (regs.rip, regs.rcx) = (CODE.into(), turns);
    vcpu.set_regs(&regs).host("KVM did not take a processor's registers")?;
    let begun = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => return Ok(begun.elapsed()),
            Ok(other) => {
                let what = format!("KVM ended the measurement with {other:?}");
                return Err(MachineError::new(MachineErrorKind::Host, what));
            }
            // A signal of the program's; its handler has run.
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).host("KVM did not run the measurement"),
        }
    }
}

/// A speed to two digits, such as `1.2 M`.
fn rounded(speed: f64) -> String {
    let (unit, name) = [(1e9, " G"), (1e6, " M"), (1e3, " k")]
        .into_iter()
        .find(|(unit, _)| speed >= *unit)
        .unwrap_or((1.0, ""));
    let value = speed / unit;
    if value < 10.0 { format!("{value:.1}{name}") } else { format!("{value:.0}{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_rounded() {
        for (speed, expect) in [(0.0, "0.0"), (1_234_567.0, "1.2 M"), (3.21e9, "3.2 G"), (185e6, "185 M")] {
            assert_eq!(rounded(speed), expect);
        }
    }
}
