//! QEMU's command line for a machine: a pure function of the specification.

use std::ffi::OsString;

use instance_core::machine::{Identity, MachineSpec, NetSpec};
use serde_json::{Value, json};

use crate::Accelerator;
use crate::disks::Name;

/// What the child finds its files and sockets by.
#[derive(Debug)]
pub(crate) struct Endpoints {
    /// The number of the QMP socket.
    pub(crate) qmp: i32,
    /// The number of the console's socket.
    pub(crate) console: i32,
    /// The path of the log.
    pub(crate) log: String,
    /// The path of the kernel.
    pub(crate) kernel: String,
    /// The path of the initial RAM disk.
    pub(crate) initrd: Option<String>,
    /// The disks' names and the numbers of their NBD connections, in the disks' order.
    pub(crate) disks: Vec<(Name, i32)>,
    /// The numbers of the network ports' sockets.
    pub(crate) nets: Vec<i32>,
}

/// The arguments, without the program's name.
pub(crate) fn arguments(
    spec: &MachineSpec,
    accelerator: Accelerator,
    sandbox: bool,
    at: &Endpoints,
) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: &str| args.extend([option.into(), value.into()]);

    add("-name", &format!("guest={}", doubled(&spec.name)));
    // Not `microvm`: under the TCG of QEMU 7.2 every other boot of Linux with a virtio-mmio disk stood still
    // for ever, and those that did not were no faster.
    add("-machine", "q35,usb=off,sata=off,smbus=off,vmport=off");
    match accelerator {
        Accelerator::Tcg => {
            add("-accel", "tcg");
            add("-cpu", "max");
            // Only the emulator can tell a triple fault from a reset, and only here.
            add("-d", "cpu_reset");
            add("-D", &at.log);
        }
        Accelerator::Kvm => {
            add("-accel", "kvm");
            add("-cpu", "host");
        }
    }
    let (vcpus, threads) = (spec.vcpus, spec.threads_per_core);
    add("-smp", &format!("{vcpus},sockets=1,cores={},threads={threads}", vcpus.get() / threads));
    add("-m", &format!("{}M", spec.memory_mib));
    for option in ["-nodefaults", "-no-user-config", "-S"] {
        args.push(option.into());
    }
    let mut add = |option: &str, value: &str| args.extend([option.into(), value.into()]);
    add("-display", "none");
    add("-action", "reboot=shutdown,shutdown=poweroff,panic=shutdown");
    if sandbox {
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    }
    add("-chardev", &format!("socket,id=qmp,fd={}", at.qmp));
    add("-mon", "chardev=qmp,mode=control");
    add("-chardev", &format!("socket,id=console,fd={}", at.console));
    add("-serial", "chardev:console");

    // By which a guest's kernel says that it panicked.
    add("-device", "pvpanic");

    if let Some(identity) = &spec.identity {
        smbios(identity).iter().for_each(|table| add("-smbios", table));
    }
    add("-kernel", &at.kernel);
    if let Some(initrd) = &at.initrd {
        add("-initrd", initrd);
    }
    add("-append", &spec.boot.command_line);

    // Disks come and go behind it: what is on the root bus stays. Guests find those on the root bus first.
    // The firmware gives a bridge that is empty no addresses, unless it asks for some.
    let room = "mem-reserve=2M,pref64-reserve=2M";
    add("-device", &format!("pci-bridge,id={BRIDGE},addr={BRIDGE_ADDRESS:#x},chassis_nr=1,shpc=off,{room}"));
    for (disk, (name, fd)) in spec.disks.iter().zip(&at.disks) {
        add("-blockdev", &blockdev(*name, disk.disk.read_only(), &fd.to_string()).to_string());
        add("-device", &device(*name, &disk.serial).to_string());
    }
    for (n, (net, fd)) in spec.nets.iter().zip(&at.nets).enumerate() {
        add("-netdev", &format!("socket,id=net{n},fd={fd}"));
        add("-device", &net_device(n, net).to_string());
    }
    args
}

/// The bridge behind which disks come and go, and its address; 0 is the host bridge, 1 the first disk.
const BRIDGE: &str = "disks";
const BRIDGE_ADDRESS: u32 = 2;

/// The address of the first network port; the others follow.
const FIRST_NET_ADDRESS: usize = 3;

/// The device of the `n`th network port.
fn net_device(n: usize, net: &NetSpec) -> Value {
    json!({
        "driver": "virtio-net-pci",
        "id": format!("port{n}"),
        "bus": "pcie.0",
        "addr": format!("{:#x}", FIRST_NET_ADDRESS + n),
        "disable-legacy": "on",
        "netdev": format!("net{n}"),
        "mac": net.mac.to_string(),
        "host_mtu": net.mtu,
        // Nothing boots from it.
        "romfile": "",
    })
}

/// A disk's node, over its connection.
pub(crate) fn blockdev(name: Name, read_only: bool, fd: &str) -> Value {
    raw(name, read_only, connection(name, read_only, fd))
}

/// The node of a disk's connection, `fd`: its number, or the name under which QEMU was given it.
pub(crate) fn connection(name: Name, read_only: bool, fd: &str) -> Value {
    json!({
        "driver": "nbd",
        "node-name": name.connection(),
        "server": { "type": "fd", "str": fd },
        "read-only": read_only,
        "discard": "unmap",
        "detect-zeroes": "off",
    })
}

/// The node that the device uses, over another. It passes everything on, and can be put onto another connection.
pub(crate) fn raw(name: Name, read_only: bool, file: Value) -> Value {
    json!({
        "driver": "raw",
        "node-name": name.device(),
        "file": file,
        "read-only": read_only,
        "discard": "unmap",
        "detect-zeroes": "off",
    })
}

/// A disk's device.
pub(crate) fn device(name: Name, serial: &str) -> Value {
    // Guests look for devices in the order of their addresses.
    let (bus, address) = name.slot.map_or(("pcie.0", 1), |slot| (BRIDGE, slot));
    json!({
        "driver": "virtio-blk-pci",
        "id": name.device(),
        "bus": bus,
        "addr": format!("{address:#x}"),
        "disable-legacy": "on",
        "drive": name.device(),
        "serial": serial,
        // The guest is told what failed; QEMU would otherwise stop it where space runs out.
        "werror": "report",
        "rerror": "report",
    })
}

/// A text as part of an option's value, where a comma is doubled.
fn doubled(text: &str) -> String {
    text.replace(',', ",,")
}

/// The fields of the SMBIOS tables that QEMU fills in as it is told.
fn smbios(identity: &Identity) -> [String; 4] {
    let [vendor, product, serial, tag] =
        [&identity.vendor, &identity.product, &identity.serial, &identity.asset_tag]
            .map(|text| doubled(text));
    let uuid = identity.uuid_text();
    [
        format!("type=0,vendor={vendor},version=1.0"),
        format!("type=1,manufacturer={vendor},product={product},serial={serial},uuid={uuid}"),
        format!("type=2,manufacturer={vendor},asset={tag}"),
        format!("type=3,manufacturer={vendor},asset={vendor}"),
    ]
}

#[cfg(test)]
mod tests {
    use ami_core::Architecture;
    use instance_core::console::Console;
    use instance_core::machine::{Boot, BootFile};

    use super::*;

    #[test]
    fn processors_are_threads_of_the_cores_of_one_socket() {
        let kernel = BootFile::new(tempfile::tempfile().unwrap()).unwrap();
        let boot = Boot::new(kernel, None, "");
        let mut spec = MachineSpec::new("test", Architecture::X86_64, boot, Console::new().port());
        let [log, kernel] = ["log", "kernel"].map(str::to_owned);
        let at =
            Endpoints { qmp: 3, console: 4, log, kernel, initrd: None, disks: Vec::new(), nets: Vec::new() };
        for (vcpus, threads, told) in
            [(1, 1, "1,sockets=1,cores=1,threads=1"), (6, 2, "6,sockets=1,cores=3,threads=2")]
        {
            (spec.vcpus, spec.threads_per_core) = (vcpus.try_into().unwrap(), threads.try_into().unwrap());
            let args = arguments(&spec, Accelerator::Tcg, false, &at);
            let smp = args.iter().position(|arg| arg == "-smp").unwrap();
            assert_eq!(args[smp + 1], told);
        }
    }
}
