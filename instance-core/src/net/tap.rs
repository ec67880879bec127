//! TAP devices of the host's as the other end of a port: what a machine sends goes to the host's kernel, which
//! switches or routes it.
#![allow(unsafe_code, reason = "the host's kernel is told of TAP devices by ioctl")]

use std::ffi::CStr;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::ioctl::{self, Opcode};

use super::header::{HEADER_LEN, frame_of, header_of};
use super::{Frame, NetPort, Offloads, SendError};

/// Where TAP devices are made.
const TUN: &str = "/dev/net/tun";

/// A device of the host's on which whole frames come and go, without a name before each but with what is left to be done
/// to it.
const KIND: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

const SET_DEVICE: Opcode = libc::TUNSETIFF as Opcode;
const GET_DEVICE: Opcode = libc::TUNGETIFF as Opcode;
const SET_HEADER_LEN: Opcode = libc::TUNSETVNETHDRSZ as Opcode;
const SET_LITTLE_ENDIAN: Opcode = libc::TUNSETVNETLE as Opcode;
const SET_OFFLOADS: Opcode = libc::TUNSETOFFLOAD as Opcode;

/// A TAP device of the host's (Linux, `Documentation/networking/tuntap.rst`): the privileged way into a network.
///
/// A machine whose port it is sends to the host's kernel and receives from it, with nothing of this library's in between:
/// no switch, no firewall, no address or metadata service. Who makes the device has it part of a bridge or of the host's
/// routing, and brings it up. A hypervisor that can has the host's kernel move the frames (vhost-net). That somebody has
/// deleted the device is noticed when a frame is sent or received, and not where the host's kernel moves them.
///
/// ```
/// use instance_core::machine::NetSpec;
/// use instance_core::net::{MacAddress, Tap};
///
/// match Tap::open("ami-doc%d") {
///     Ok(tap) => {
///         println!("now: ip link set {} up", tap.name());
///         let port = NetSpec::new(tap.into_port(), MacAddress([2, 0, 0, 0, 0, 1]));
///         assert!(port.port.tap().is_some());
///     }
///     Err(error) => println!("{error}"), // says what is missing
/// }
/// ```
#[derive(Debug)]
pub struct Tap {
    device: Arc<OwnedFd>,
    name: String,
    state: Mutex<State>,
    gone: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Where frames are read to, before it is known how long they are.
    buffer: Box<[u8]>,
    takes: Offloads,
}

impl Tap {
    /// Opens the TAP device of this name, which is made if there is none, and then goes with the last that holds it.
    /// A name with `%d` in it is completed by a number.
    ///
    /// This needs the capability `CAP_NET_ADMIN`, or a device that somebody who has it made for this user (`ip tuntap add
    /// mode tap user`).
    ///
    /// # Errors
    ///
    /// Those of the host: the device is used by another, may not be made, or there are none at all.
    pub fn open(name: &str) -> io::Result<Self> {
        let refused = |error: io::Error| {
            let why = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    ": it needs CAP_NET_ADMIN, or a device made for this user by `ip tuntap add mode tap user`"
                }
                io::ErrorKind::NotFound => ": this host has no /dev/net/tun, which the module `tun` makes",
                _ if error.raw_os_error() == Some(libc::EINVAL) => {
                    ": it is there and no TAP device of one queue, or this is no name"
                }
                _ => "",
            };
            io::Error::new(error.kind(), format!("cannot open TAP device {name:?}: {error}{why}"))
        };
        let open = || {
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let device = rustix::fs::open(Path::new(TUN), flags, Mode::empty())?;
            // SAFETY: TUNSETIFF reads an `ifreq`, whose name ends with a zero, and writes the name that it has chosen.
            unsafe { ioctl::ioctl(&device, ioctl::Updater::<SET_DEVICE, _>::new(&mut request(name)?)) }?;
            Ok(device)
        };
        open().and_then(Self::prepare).map_err(refused)
    }

    /// The TAP device behind a descriptor, opened by somebody who may, with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`
    /// and one queue. It becomes one that does not block.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) where the descriptor is none of such a device, or what the host
    /// refused.
    pub fn from_fd(device: OwnedFd) -> io::Result<Self> {
        let no_tap = || io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is no TAP device's");
        let flags = rustix::fs::fcntl_getfl(&device)?;
        let (_, kind) = described(&device).map_err(|_| no_tap())?;
        if kind & (KIND | libc::IFF_MULTI_QUEUE) != KIND {
            let what = "the device is no TAP device with IFF_NO_PI and IFF_VNET_HDR and one queue";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        rustix::fs::fcntl_setfl(&device, flags | OFlags::NONBLOCK)?;
        rustix::io::fcntl_setfd(&device, FdFlags::CLOEXEC)?;
        Self::prepare(device)
    }

    fn prepare(device: OwnedFd) -> io::Result<Self> {
        let (name, _) = described(&device)?;
        let (len, yes): (libc::c_int, libc::c_int) = (HEADER_LEN as libc::c_int, 1);
        // SAFETY: both read an `int`.
        unsafe {
            ioctl::ioctl(&device, ioctl::Setter::<SET_HEADER_LEN, _>::new(len))?;
            ioctl::ioctl(&device, ioctl::Setter::<SET_LITTLE_ENDIAN, _>::new(yes))?;
        }
        let state =
            State { buffer: vec![0; HEADER_LEN + Frame::MAX_LEN].into_boxed_slice(), takes: Offloads::NONE };
        let device = Arc::new(device);
        let tap = Self { device, name, state: Mutex::new(state), gone: AtomicBool::new(false) };
        tap.tell_offloads(Offloads::NONE)?;
        Ok(tap)
    }

    /// Its name among the host's network devices.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A port whose other end it is.
    pub fn into_port(self) -> NetPort {
        NetPort::on_tap(Arc::new(self))
    }

    /// Says what the machine takes that a complete frame is not.
    fn tell_offloads(&self, takes: Offloads) -> io::Result<()> {
        let Offloads { checksum, tcp4, tcp6 } = takes;
        let bits = [(libc::TUN_F_CSUM, checksum), (libc::TUN_F_TSO4, tcp4), (libc::TUN_F_TSO6, tcp6)];
        let bits = bits.into_iter().filter(|(_, taken)| *taken).fold(0, |bits, (bit, _)| bits | bit);
        // SAFETY: the argument of TUNSETOFFLOAD is a number.
        unsafe {
            ioctl::ioctl(&self.device, ioctl::IntegerSetter::<SET_OFFLOADS>::new_usize(bits as usize))
        }?;
        Ok(())
    }

    pub(super) fn set_takes(&self, takes: Offloads) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The host is asked no oftener than it has to be: guests decide how often this is called.
        if mem::replace(&mut state.takes, takes) != takes {
            let told = self.tell_offloads(takes);
            let _ = told.inspect_err(
                |error| tracing::debug!(%error, name = self.name, "a TAP device did not take what a guest takes"),
            );
        }
    }

    pub(super) fn takes(&self) -> Offloads {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).takes
    }

    pub(super) fn descriptor(&self) -> Arc<OwnedFd> {
        self.device.clone()
    }

    pub(super) fn is_there(&self) -> bool {
        !self.gone.load(Ordering::Relaxed)
    }

    /// Sends a frame. One that the host has no room for is lost, as is one on a device that is down.
    pub(super) fn send(&self, frame: &Frame) -> Result<(), SendError> {
        let header = header_of(frame);
        match rustix::io::writev(&self.device, &[IoSlice::new(&header), IoSlice::new(&frame.data)]) {
            // The device was deleted (Linux, `drivers/net/tun.c`, `tun_chr_write_iter`).
            Err(Errno::BADFD) => {
                self.gone.store(true, Ordering::Relaxed);
                Err(SendError::Disconnected)
            }
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::trace!(%error, name = self.name, "a TAP device did not take a frame");
                Ok(())
            }
        }
    }

    /// Drops the frames that wait, as many as the device's queue holds by default. What is longer than what it is read into
    /// is lost, which is what is wanted.
    pub(super) fn discard(&self) {
        let mut header = [0; HEADER_LEN];
        (0..super::FRAMES_KEPT).find(|_| rustix::io::read(&self.device, &mut header).is_err());
    }

    /// The next frame, if one waits.
    pub(super) fn recv(&self) -> Option<Frame> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match rustix::io::readv(&self.device, &mut [IoSliceMut::new(&mut state.buffer)]) {
                Ok(len) => match frame_of(state.buffer.get(..len).unwrap_or_default()) {
                    Some(frame) => return Some(frame),
                    None => {
                        tracing::trace!(name = self.name, "a TAP device's frame is none that a guest takes")
                    }
                },
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.gone.fetch_or(error == Errno::BADFD, Ordering::Relaxed);
                    return None;
                }
            }
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// What the kernel is asked for: a device of this name.
fn request(name: &str) -> io::Result<libc::ifreq> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "no name for a network device");
    let ifru_flags = KIND as libc::c_short;
    let mut ifr_name = [0; libc::IFNAMSIZ];
    // With the zero that ends it.
    if name.len() >= ifr_name.len() || name.contains('\0') {
        return Err(invalid());
    }
    ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
    Ok(libc::ifreq { ifr_name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags } })
}

/// A device's name and kind.
fn described(device: &OwnedFd) -> io::Result<(String, libc::c_int)> {
    let mut answer = request("")?;
    // SAFETY: TUNGETIFF writes an `ifreq`: a name that ends with a zero, and flags.
    let flags = unsafe {
        ioctl::ioctl(device, ioctl::Updater::<GET_DEVICE, _>::new(&mut answer))?;
        answer.ifr_ifru.ifru_flags
    };
    let name = answer.ifr_name.map(|byte| byte as u8);
    let name = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy);
    Ok((name.unwrap_or_default().into_owned(), libc::c_int::from(flags) & 0xffff))
}
