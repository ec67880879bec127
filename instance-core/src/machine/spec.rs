//! What a machine is made from.

use std::fs::File;
use std::io;
use std::num::NonZeroU32;
use std::ops::Deref;
use std::path::PathBuf;

use ami_core::Architecture;
use storage_block::Disk;

use super::{MachineError, MachineErrorKind, OpenFile};
use crate::console::ConsolePort;
use crate::net::{FrameLimits, MacAddress, NetPort};
use crate::vsock::VsockSpec;

/// Everything a machine is made from.
///
/// ```
/// use ami_core::Architecture;
/// use instance_core::console::Console;
/// use instance_core::machine::{Boot, DiskSpec, Hypervisor, MachineErrorKind, MachineSpec};
/// use instance_core::testing::{FakeHypervisor, fake_kernel};
///
/// let boot = Boot::new(fake_kernel("")?, None, "console=ttyS0 root=/dev/vda1");
/// let mut spec = MachineSpec::new("web", Architecture::X86_64, boot, Console::new().port());
/// (spec.vcpus, spec.memory_mib) = (2.try_into()?, 1024.try_into()?);
/// spec.disks.push(DiskSpec::new(storage_block::MemoryDisk::new(1 << 20)?.into_disk(), "vol0"));
/// let can = FakeHypervisor::new().capabilities();
/// can.check(&spec)?;
/// spec.architecture = Architecture::Arm64;
/// assert_eq!(can.check(&spec).err().map(|e| e.kind()), Some(MachineErrorKind::Unsupported));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MachineSpec {
    /// A name for threads, logs and errors, such as the instance id.
    pub name: String,
    /// The architecture of the machine.
    pub architecture: Architecture,
    /// How many virtual processors.
    pub vcpus: NonZeroU32,
    /// How many of them are threads of one core. The cores are those of one package.
    pub threads_per_core: NonZeroU32,
    /// How much memory, in MiB.
    pub memory_mib: NonZeroU32,
    /// What it boots.
    pub boot: Boot,
    /// Its disks, in the order in which the guest finds them; the first is the root disk.
    pub disks: Vec<DiskSpec>,
    /// Its network ports, in the order in which the guest finds them.
    pub nets: Vec<NetSpec>,
    /// Its place for streams with the host, if it has one.
    pub vsock: Option<VsockSpec>,
    /// The machine's side of its serial console.
    pub console: ConsolePort,
    /// The machine's side of a second console, if it is to have one: virtio's, which a Linux guest has as `hvc0`.
    /// A character of it costs no exit of a processor, and its guest knows the terminal's size. Its
    /// [`Console`](crate::console::Console) is another than that of the serial port, which is there all the same.
    pub virtio_console: Option<ConsolePort>,
    /// What the machine tells its guest of itself, if anything.
    pub identity: Option<Identity>,
    /// Where the machine may have a directory of its own, for sockets and the like. It is not there or empty at the start:
    /// a machine that needs it makes it, since most need none. Its owner removes it after the end.
    pub runtime_dir: PathBuf,
}

impl MachineSpec {
    /// A machine with one vCPU, one thread a core, and 128 MiB, without disks and identity, with the temporary directory as
    /// its runtime directory.
    pub fn new(
        name: impl Into<String>,
        architecture: Architecture,
        boot: Boot,
        console: ConsolePort,
    ) -> Self {
        Self {
            name: name.into(),
            architecture,
            vcpus: NonZeroU32::MIN,
            threads_per_core: NonZeroU32::MIN,
            memory_mib: NonZeroU32::MIN.saturating_add(127),
            boot,
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            console,
            virtio_console: None,
            identity: None,
            runtime_dir: std::env::temp_dir(),
        }
    }
}

/// A kernel, loaded directly: there is no firmware. [`MachineSpec`] shows it in use.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Boot {
    /// An unpacked kernel: an ELF file with a PVH note or a 64-bit entry (x86), an `Image` (ARM).
    pub kernel: BootFile,
    /// The initial RAM disk.
    pub initrd: Option<BootFile>,
    /// The kernel's command line, as the kernel gets it.
    pub command_line: String,
}

impl Boot {
    /// Boots `kernel` with this command line.
    pub fn new(kernel: BootFile, initrd: Option<BootFile>, command_line: impl Into<String>) -> Self {
        Self { kernel, initrd, command_line: command_line.into() }
    }
}

/// A file to boot: an [`OpenFile`]. Cheap to clone.
///
/// ```
/// use std::io::Write;
/// use instance_core::machine::BootFile;
///
/// let mut file = tempfile::tempfile()?;
/// file.write_all(b"\x7fELF")?;
/// let kernel = BootFile::new(file)?;
/// assert_eq!((kernel.len(), kernel.is_empty()), (4, false));
/// assert_eq!(kernel.read()?, b"\x7fELF");
/// assert_eq!(kernel.file().metadata()?.len(), kernel.len());
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct BootFile(OpenFile);

impl BootFile {
    /// The file as it is now; whoever hands it over promises that it does not change.
    ///
    /// # Errors
    ///
    /// What the operating system says of its length.
    pub fn new(file: File) -> io::Result<Self> {
        OpenFile::new(file).map(Self)
    }
}

impl Deref for BootFile {
    type Target = OpenFile;

    fn deref(&self) -> &OpenFile {
        &self.0
    }
}

/// A disk of a machine. [`MachineSpec`] shows it in use.
///
/// A backend of one's own must not kill or drop its machine from a call that serves a request: the machine ends when no
/// request is under way any more.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DiskSpec {
    /// The bytes.
    pub disk: Disk,
    /// The serial number that the guest reads, at most 20 bytes (virtio 1.2, 5.2.6.1).
    pub serial: String,
}

impl DiskSpec {
    /// The most bytes of a serial number.
    pub const MAX_SERIAL: usize = 20;

    /// A disk with a serial number.
    pub fn new(disk: Disk, serial: impl Into<String>) -> Self {
        Self { disk, serial: serial.into() }
    }

    /// That the serial number is one that a guest can be told.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) if not.
    pub fn check(&self) -> Result<(), MachineError> {
        if self.has_valid_serial() {
            return Ok(());
        }
        let (serial, most) = (&self.serial, Self::MAX_SERIAL);
        let what = format!("{serial:?} is no serial number of at most {most} bytes");
        Err(MachineError::new(MachineErrorKind::Unsupported, what))
    }

    /// Whether the serial number is one that a guest can be told.
    pub fn has_valid_serial(&self) -> bool {
        self.serial.len() <= Self::MAX_SERIAL && !self.serial.contains('\0')
    }
}

/// A network port of a machine.
///
/// ```
/// use instance_core::machine::NetSpec;
/// use instance_core::net::{self, MacAddress};
///
/// let (machine, _network) = net::link();
/// let port = NetSpec::new(machine, "02:00:0a:00:00:0c".parse()?);
/// assert_eq!(port.mtu, 1500);
/// port.check()?;
/// assert!(NetSpec::new(port.port, MacAddress::BROADCAST).check().is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NetSpec {
    /// The machine's end of the cable.
    pub port: NetPort,
    /// The address that the guest is given.
    pub mac: MacAddress,
    /// The longest packet of the network, in bytes behind the Ethernet header, which the guest is told.
    pub mtu: u16,
    /// What holds the frames to the guest to a rate. Those that have to wait stay in the cable.
    pub receive_limits: FrameLimits,
    /// What holds the frames from the guest to a rate. Those that have to wait stay in the guest.
    pub transmit_limits: FrameLimits,
}

impl NetSpec {
    /// The shortest MTU that there may be: what IPv4 asks for (RFC 791; virtio 1.2, 5.1.4.1).
    pub const MIN_MTU: u16 = 68;

    /// A port with this address, an MTU of 1500 and no limits.
    pub fn new(port: NetPort, mac: MacAddress) -> Self {
        let (receive_limits, transmit_limits) = Default::default();
        Self { port, mac, mtu: 1500, receive_limits, transmit_limits }
    }

    /// Whether frames are held to a rate.
    pub fn is_limited(&self) -> bool {
        !self.receive_limits.is_none() || !self.transmit_limits.is_none()
    }

    /// That the address is one station's, and the MTU one that a guest can be told.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](MachineErrorKind::Unsupported) if not.
    pub fn check(&self) -> Result<(), MachineError> {
        let unsupported = |what| Err(MachineError::new(MachineErrorKind::Unsupported, what));
        if !self.mac.is_unicast() || self.mac == MacAddress([0; 6]) {
            return unsupported(format!("{} is no address of a machine's", self.mac));
        }
        if self.mtu < Self::MIN_MTU {
            return unsupported(format!("an MTU of {} is less than {}", self.mtu, Self::MIN_MTU));
        }
        Ok(())
    }
}

/// What a machine tells its guest of itself in its SMBIOS tables (DMTF DSP0134). By it cloud-init knows
/// that it runs in EC2, and which instance it is.
///
/// Each text has at most [`MAX_TEXT`](Self::MAX_TEXT) bytes, none of them a control character; a
/// hypervisor refuses others.
///
/// ```
/// use instance_core::machine::Identity;
///
/// let mut identity = Identity::new([0xec; 16]);
/// identity.vendor = "Amazon EC2".to_owned();
/// identity.asset_tag = "i-0123456789abcdef0".to_owned();
/// assert_eq!(identity.uuid_text(), "ecececec-ecec-ecec-ecec-ecececececec");
/// assert!(identity.is_valid());
/// identity.product = "x".repeat(Identity::MAX_TEXT + 1);
/// assert!(!identity.is_valid());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Identity {
    /// Who made BIOS, system, board and chassis.
    pub vendor: String,
    /// The name of the system: an instance's type.
    pub product: String,
    /// The UUID of the system, in the order in which it is written.
    pub uuid: [u8; 16],
    /// The serial number of the system.
    pub serial: String,
    /// The asset tag of the board: an instance's id.
    pub asset_tag: String,
}

impl Identity {
    /// The most bytes of a text.
    pub const MAX_TEXT: usize = 64;

    /// An identity with this UUID, which is its serial number too, and empty texts.
    pub fn new(uuid: [u8; 16]) -> Self {
        let text = uuid::Uuid::from_bytes(uuid).to_string();
        let (vendor, product, asset_tag) = Default::default();
        Self { vendor, product, uuid, serial: text, asset_tag }
    }

    /// The UUID as it is written, in lower case.
    pub fn uuid_text(&self) -> String {
        uuid::Uuid::from_bytes(self.uuid).to_string()
    }

    /// Whether the texts are such as tables can hold.
    pub fn is_valid(&self) -> bool {
        [&self.vendor, &self.product, &self.serial, &self.asset_tag]
            .iter()
            .all(|text| text.len() <= Self::MAX_TEXT && !text.chars().any(char::is_control))
    }
}
