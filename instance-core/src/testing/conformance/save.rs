//! Machines that are saved, and go on elsewhere.

use std::num::NonZeroU32;
use std::os::unix::fs::FileExt;

use storage_block::Disk;

use super::life::Held;
use super::nets::{FIRST, Peer};
use super::{Guest, TestBed, disk, own_dir, word_at};
use crate::console::Console;
use crate::machine::{
    DiskSpec, ExitCause, Machine, MachineError, MachineErrorKind, MachineState, NetSpec, RestoreSpec,
    SavedMachine,
};

const ROOT: &str = "vol-root";
const SECTORS: u64 = 2048;

impl TestBed<'_> {
    /// What restores the machine, which is paused.
    fn saved(&self, machine: &dyn Machine) -> SavedMachine {
        let file = tempfile::tempfile().expect("a temporary file");
        machine.save(&file).expect("the machine is saved");
        assert_eq!(machine.state().get(), MachineState::Paused);
        SavedMachine::new(file).expect("it has a length")
    }

    fn try_restore(
        &self,
        saved: &SavedMachine,
        disks: Vec<DiskSpec>,
        nets: Vec<NetSpec>,
    ) -> Result<Guest, MachineError> {
        let runtime_dir = tempfile::tempdir().expect("a temporary directory");
        let console = Console::new();
        let mut spec = RestoreSpec::new("restored", saved.clone(), console.port());
        (spec.disks, spec.nets) = (disks, nets);
        spec.runtime_dir = own_dir(runtime_dir.path());
        let machine = self.hypervisor.restore(spec)?;
        let reader = console.reader();
        Ok(Guest { machine, console, reader, patience: self.patience, runtime_dir })
    }

    fn restored(&self, saved: &SavedMachine, disk: &Disk, nets: Vec<NetSpec>) -> Guest {
        let disks = vec![DiskSpec::new(disk.clone(), ROOT)];
        let guest = self.try_restore(saved, disks, nets).expect("the machine is restored");
        assert_eq!(guest.machine.state().get(), MachineState::Paused);
        guest
    }

    /// Whether there is anything to check.
    fn saves(&self) -> bool {
        let saves = self.hypervisor.capabilities().save;
        if !saves {
            println!("machines cannot be saved: not checked");
        }
        saves
    }
}

/// Another disk with the same bytes.
fn copy(of: &Disk) -> Disk {
    let mut bytes = vec![0; of.size() as usize];
    of.read_at(&mut bytes, 0).expect("the disk can be read");
    let copy = disk(of.size() / 512);
    copy.write_at(&bytes, 0).expect("written");
    copy
}

pub(super) fn refuses_what_it_cannot(bed: &TestBed<'_>) {
    let kind = |done: Result<(), MachineError>| done.expect_err("it cannot be").kind();
    let first = disk(SECTORS);
    let guest = bed.up(vec![DiskSpec::new(first.clone(), ROOT)]);
    let file = tempfile::tempfile().expect("a temporary file");
    if !bed.saves() {
        guest.machine.pause().expect("pauses");
        assert_eq!(kind(guest.machine.save(&file)), MachineErrorKind::Unsupported);
        let saved = SavedMachine::new(file).expect("it has a length");
        let refused = bed.try_restore(&saved, Vec::new(), Vec::new()).map(drop);
        return assert_eq!(kind(refused), MachineErrorKind::Unsupported);
    }
    assert_eq!(kind(guest.machine.save(&file)), MachineErrorKind::WrongState, "it runs");
    guest.machine.pause().expect("pauses");
    let saved = bed.saved(&*guest.machine);
    drop(guest);
    let saved_as = |bytes: &[u8]| {
        let file = tempfile::tempfile().expect("a temporary file");
        file.write_all_at(bytes, 0).expect("it can be written");
        SavedMachine::new(file).expect("it has a length")
    };
    let mut bytes = vec![0; saved.len() as usize];
    saved.file().read_exact_at(&mut bytes, 0).expect("it can be read");
    let root = || vec![DiskSpec::new(first.clone(), ROOT)];
    let port = || vec![Peer::of(bed, FIRST).0];
    for (what, saved, disks, nets) in [
        ("an empty file", saved_as(b""), root(), vec![]),
        ("text", saved_as(&[b'x'; 10_000]), root(), vec![]),
        ("the first half", saved_as(&bytes[..bytes.len() / 2]), root(), vec![]),
        ("all but the last byte", saved_as(&bytes[..bytes.len() - 1]), root(), vec![]),
        ("no disk", saved.clone(), vec![], vec![]),
        ("another disk", saved.clone(), vec![DiskSpec::new(first.clone(), "vol-other")], vec![]),
        ("a smaller disk", saved.clone(), vec![DiskSpec::new(disk(SECTORS / 2), ROOT)], vec![]),
        ("a disk too many", saved.clone(), vec![DiskSpec::new(first.clone(), ROOT); 2], vec![]),
        ("a port that it did not have", saved.clone(), root(), port()),
    ] {
        let before = Held::now();
        let refused = bed.try_restore(&saved, disks, nets).map(drop).expect_err(what);
        assert_eq!(refused.kind(), MachineErrorKind::Saved, "{what}: {refused}");
        assert_eq!(Held::now(), before, "{what}: something is left");
    }
    drop(bed.try_restore(&saved, root(), vec![]).expect("all is well with this one"));
}

pub(super) fn saves_and_restores(bed: &TestBed<'_>) {
    if !bed.saves() {
        return;
    }
    let with_net = bed.hypervisor.capabilities().max_nets > 0;
    let original = disk(SECTORS);
    let (cable, peer) = Peer::of(bed, FIRST);
    let mut guest = bed.up_with(vec![DiskSpec::new(original.clone(), ROOT)], |spec| {
        spec.vcpus = NonZeroU32::new(bed.vcpus).expect("the test bed gives vCPUs");
        spec.nets.extend(with_net.then_some(cable));
    });
    if with_net {
        guest.expect_answer(&format!("up 0 {}", FIRST.address), "up");
        peer.ping(b"before", bed.patience);
    }
    guest.expect_answer("remember before", "remembered");
    guest.expect_answer("write 0 1 before", "wrote");
    // A line that is half typed stays so.
    guest.console.write_all(b"ping half", guest.deadline()).expect("the guest reads");
    guest.machine.pause().expect("pauses");
    let saved = bed.saved(&*guest.machine);
    let frozen = copy(&original);

    // The machine itself goes on as if nothing had been.
    guest.machine.resume().expect("resumes");
    guest.expect_answer("-way", "pong half-way");
    guest.expect_answer("remember after", "remembered");
    guest.expect_answer("write 0 1 after", "wrote");
    if with_net {
        peer.ping(b"after", bed.patience);
    }
    drop(guest);

    let nets = || {
        let (cable, peer) = Peer::of(bed, FIRST);
        (if with_net { vec![cable] } else { vec![] }, peer)
    };
    let ((net, one_peer), (other_net, other_peer)) = (nets(), nets());
    let (one_disk, other_disk) = (copy(&frozen), copy(&frozen));
    let mut one = bed.restored(&saved, &one_disk, net);
    let mut other = bed.restored(&saved, &other_disk, other_net);
    for (guest, peer, disk, word) in
        [(&mut one, &one_peer, &one_disk, "one"), (&mut other, &other_peer, &other_disk, "other")]
    {
        guest.machine.resume().expect("resumes");
        guest.tell("");
        guest.expect_answer("recall", "recalled before");
        guest.expect_answer("cpus", &format!("cpus {}", bed.vcpus));
        guest.expect_answer("read 0 1", "data before");
        guest.expect_answer(&format!("remember {word}"), "remembered");
        guest.expect_answer(&format!("write 0 1 {word}"), "wrote");
        assert_eq!(word_at(disk, 1), word);
        if with_net {
            peer.ping(word.as_bytes(), bed.patience);
        }
    }
    one.expect_answer("recall", "recalled one");
    assert_eq!(word_at(&one_disk, 1), "one");

    // What was restored can be saved again, and still be told to power off.
    one.machine.pause().expect("pauses");
    let again = bed.saved(&*one.machine);
    drop((one, saved));
    let (net, _peer) = nets();
    let mut again = bed.restored(&again, &one_disk, net);
    again.machine.resume().expect("resumes");
    again.expect_answer("recall", "recalled one");
    other.expect_answer("recall", "recalled other");
    if bed.hypervisor.capabilities().power_button {
        again.machine.power_button().expect("pressed");
        assert_eq!(again.expect_exit(), ExitCause::PowerOff);
    }
    other.tell("reboot");
    assert_eq!(other.expect_exit(), ExitCause::Reset);
}

pub(super) fn restores_with_disks_in_any_order(bed: &TestBed<'_>) {
    if !bed.saves() || bed.hypervisor.capabilities().max_disks < 3 {
        return;
    }
    let disks = ["a", "b", "c"].map(|serial| DiskSpec::new(disk(SECTORS), serial));
    let mut guest = bed.up(disks.to_vec());
    for (number, disk) in disks.iter().enumerate() {
        guest.expect_answer(&format!("write {number} 1 {}", disk.serial), "wrote");
    }
    guest.machine.pause().expect("pauses");
    let saved = bed.saved(&*guest.machine);
    drop(guest);
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let given = order.map(|number| disks[number].clone()).to_vec();
        let mut guest = bed.try_restore(&saved, given, Vec::new()).expect("they are its disks");
        guest.machine.resume().expect("resumes");
        for (number, disk) in disks.iter().enumerate() {
            guest.expect_answer(&format!("read {number} 1"), &format!("data {}", disk.serial));
        }
    }
}
