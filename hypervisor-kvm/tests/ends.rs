//! How machines end is told by types, with the registers that explain it.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use ami_core::Architecture;
use instance_core::console::Console;
use instance_core::machine::{
    ExitCause, Hypervisor, MachineSpec, ProcessorErrorReason, RestoreSpec, SavedMachine,
};

use common::{guest, kvm, soon};

/// How the machine of a guest that is told so ends.
fn end_by(command: &str) -> Option<ExitCause> {
    let kvm = kvm()?;
    let console = Console::new();
    let spec = MachineSpec::new(command, Architecture::X86_64, guest::boot().unwrap(), console.port());
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon()).unwrap();
    console.write_all(format!("{command}\n").as_bytes(), soon()).unwrap();
    let end = machine.state().wait(soon(), |state| state.exit_cause().is_some()).unwrap();
    Some(end.exit_cause().unwrap().clone())
}

#[test]
fn what_kvm_cannot_run_says_where_it_is() {
    let Some(cause) = end_by("astray") else { return };
    let ExitCause::ProcessorError(error) = cause else { panic!("{cause:?}") };
    assert!(matches!(error.reason, ProcessorErrorReason::UnknownInstruction(_)), "{error:?}");
    let at = error.registers.unwrap();
    assert_eq!((at.rip, at.cs, at.cs_base), (0xc000_1000, 8, 0), "{at}");
    assert_eq!(at.cr0 & 1, 1, "protected mode: {at}");
}

#[test]
fn a_triple_fault_is_one() {
    let Some(cause) = end_by("crash") else { return };
    let ExitCause::TripleFault(registers) = cause else { panic!("{cause:?}") };
    assert!(registers.is_some());
}

/// The file that a restored machine's memory is mapped from is cut short by somebody.
#[test]
fn memory_that_is_gone_is_told_with_the_error_of_the_kernel() {
    let Some(kvm) = kvm() else { return };
    if !kvm.capabilities().save || !kvm.execution().unwrap().is_hardware() {
        return eprintln!(
            "SKIPPED: this host's KVM does not tell all of a machine's state, or reads its memory itself"
        );
    }
    let console = Console::new();
    let spec = MachineSpec::new("cut", Architecture::X86_64, guest::boot().unwrap(), console.port());
    let machine = kvm.create(spec).unwrap();
    machine.start().unwrap();
    console.reader().wait_for("GUEST READY\n", soon()).unwrap();
    machine.pause().unwrap();
    let file = tempfile::tempfile().unwrap();
    machine.save(&file).unwrap();
    let saved = SavedMachine::new(file.try_clone().unwrap()).unwrap();
    let restored = kvm.restore(RestoreSpec::new("cut", saved, Console::new().port())).unwrap();
    file.set_len(4096).unwrap();
    restored.resume().unwrap();
    let end = restored.state().wait(soon(), |state| state.exit_cause().is_some()).unwrap();
    let Some(ExitCause::ProcessorError(error)) = end.exit_cause() else { panic!("{end:?}") };
    assert_eq!(error.reason, ProcessorErrorReason::RunFailed(libc::EFAULT));
    assert!(error.registers.is_some());
}
