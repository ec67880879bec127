//! A network device whose frames the host's kernel moves, between the driver's queues and a TAP device (vhost-net; Linux,
//! `drivers/vhost/net.c`).
//!
//! What is left here is the device's configuration, and to pass on who is notified: the driver's notifications go to the
//! kernel, the kernel's come back as interrupts. The kernel works on a queue from when it is first served until the
//! machine is to stand still or the driver takes it back, and says then how far it has come.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::{io, mem};

use instance_core::machine::NetSpec;
use instance_core::net::{NetPort, Offloads};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vhost::net::VhostNet as _;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::net::Net;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{Config, REQUIREMENTS, taken_by_driver};
use crate::error::{HostContext, Result, unsupported};
use crate::memory::Memory;
use crate::virtio::chain::Malformed;
use crate::virtio::descriptor_of;
use crate::virtio::device::Device;
use crate::virtio::ring::{QUEUE_SIZE, Running};

/// Of frames to the guest and of frames from it.
const QUEUES: usize = 2;

/// Whether the host's kernel (vhost-net) moves the frames of network ports on TAP devices
/// ([`Tap`](instance_core::net::Tap)), or the device's thread does.
///
/// It needs `/dev/vhost-net`, which the module `vhost_net` makes, and a port that is held to no limits, and has one pair of
/// queues, however many processors there are: a saved machine whose port has more is the thread's. The kernel does not look
/// whether frames are longer than the port's MTU. Which it is, is an event of `tracing`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VhostNet {
    /// The kernel where it can, else the thread.
    #[default]
    IfPossible,
    /// The thread.
    Never,
    /// The kernel: a machine for which it cannot is not made.
    Always,
}

/// A network device in the host's kernel.
#[derive(Debug)]
pub(crate) struct KernelNet {
    config: Config,
    /// None when the machine has ended.
    kernel: Option<InKernel>,
    lines: [Line; QUEUES],
    /// Readable when one of the lines' descriptors is.
    heard: Arc<OwnedFd>,
}

/// The kernel's part.
struct InKernel {
    net: Kernel,
    /// What of the transport's and the device's features it knows.
    features: u64,
    port: NetPort,
    /// The port's TAP device, as the kernel is given it.
    backend: File,
}

/// The kernel's device.
struct Kernel(Net<Arc<Memory>>);

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl VhostKernBackend for Kernel {
    type AS = Arc<Memory>;

    fn mem(&self) -> &Self::AS {
        self.0.mem()
    }

    /// [`Running::place`] has looked, and the crate's own look takes no queue that ends where the memory does.
    fn is_valid(&self, _: &VringConfigData) -> bool {
        true
    }
}

/// What passes between the kernel and the driver of a queue.
#[derive(Debug)]
struct Line {
    /// Tells the kernel of buffers.
    kick: EventFd,
    /// The kernel tells of used buffers.
    call: EventFd,
    /// It tells that it can do nothing with the queue.
    failed: EventFd,
    at_work: bool,
}

impl KernelNet {
    /// A device that is plugged in as `spec` says, if the host's kernel is to move its frames and can; with so many pairs
    /// of queues, if it has to have so many.
    pub(crate) fn new(
        choice: VhostNet,
        spec: &NetSpec,
        pairs: Option<usize>,
        memory: &Memory,
    ) -> Result<Option<Self>> {
        let Some(tap) = spec.port.tap() else { return Ok(None) };
        let made = match choice {
            VhostNet::Never => return Ok(None),
            _ if spec.is_limited() => Err(unsupported("vhost-net does not hold frames to limits")),
            _ if pairs.is_some_and(|pairs| pairs != 1) => {
                Err(unsupported("the saved machine's network port has more queues than vhost-net serves"))
            }
            _ => Self::made(spec, memory),
        };
        let name = tap.name();
        match made {
            Ok(made) => {
                tracing::debug!(name, "vhost-net moves the frames of a TAP device");
                Ok(Some(made))
            }
            Err(error) if choice == VhostNet::IfPossible => {
                tracing::info!(%error, name, "a thread moves the frames of a TAP device");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn made(spec: &NetSpec, memory: &Memory) -> Result<Self> {
        let kernel = InKernel::new(&spec.port, memory).host("the host's kernel has no vhost-net to give")?;
        let lines = [Line::new()?, Line::new()?];
        let heard = Arc::new(watch(&lines).host("cannot wait for vhost-net")?);
        Ok(Self { config: Config::new(spec, 1), kernel: Some(kernel), lines, heard })
    }

    /// Has the kernel stop working on a queue, if it does. Which chain is the next one; nothing is under way when this
    /// returns.
    fn take_back(&mut self, queue: usize) -> Result<Option<u16>, Malformed> {
        let (Some(kernel), Some(line)) = (&self.kernel, self.lines.get_mut(queue)) else { return Ok(None) };
        if !mem::take(&mut line.at_work) {
            return Ok(None);
        }
        let stopped = kernel.net.0.set_backend(queue, None).and_then(|()| kernel.net.get_vring_base(queue));
        match stopped {
            Ok(next) => Ok(Some(next as u16)),
            Err(error) => {
                tracing::error!(%error, "vhost-net did not give a queue back: the device is closed");
                // Which ends what it does, whatever that is.
                self.kernel = None;
                self.lines.iter_mut().for_each(|line| line.at_work = false);
                Err(Malformed("vhost-net did not give the queue back"))
            }
        }
    }
}

impl InKernel {
    fn new(port: &NetPort, memory: &Memory) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let net = Kernel(Net::new(Arc::new(memory.clone()))?);
        net.set_owner()?;
        let regions: Vec<_> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                ..Default::default()
            })
            .collect();
        net.set_mem_table(&regions)?;
        let features = net.get_features()?;
        let tap = port.descriptor().ok_or("the port is on no TAP device")?;
        Ok(Self { net, features, port: port.clone(), backend: tap.try_clone()?.into() })
    }

    /// Takes over a queue.
    fn begin(&self, queue: usize, line: &Line, ring: &Running<'_>) -> Result<(), Malformed> {
        let place = ring.place()?;
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: place.size as u16,
            flags: 0,
            desc_table_addr: place.descriptors,
            used_ring_addr: place.used,
            avail_ring_addr: place.available,
            log_addr: None,
        };
        let begin = || {
            self.net.set_vring_num(queue, config.queue_size)?;
            self.net.set_vring_base(queue, ring.next_available())?;
            self.net.set_vring_addr(queue, &config)?;
            self.net.set_vring_kick(queue, &line.kick)?;
            self.net.set_vring_call(queue, &line.call)?;
            self.net.set_vring_err(queue, &line.failed)?;
            self.net.0.set_backend(queue, Some(&self.backend))
        };
        begin().map_err(|error: vhost::Error| {
            tracing::debug!(%error, queue, "vhost-net did not take a queue");
            Malformed("vhost-net did not take the queue")
        })
    }

    /// Takes over what the driver accepted, while no queue is at work.
    fn accept(&self, features: u64) -> Result<(), Malformed> {
        self.port.set_takes(taken_by_driver(features));
        self.net.set_features(features & self.features).map_err(|error| {
            tracing::debug!(%error, "vhost-net did not take the features that a driver accepted");
            Malformed("vhost-net did not take the features")
        })
    }
}

impl std::fmt::Debug for InKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InKernel").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Line {
    fn new() -> Result<Self> {
        let event = || EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).host("cannot make an eventfd");
        Ok(Self { kick: event()?, call: event()?, failed: event()?, at_work: false })
    }
}

/// A descriptor that is readable when the kernel tells of anything.
fn watch(lines: &[Line]) -> io::Result<OwnedFd> {
    let heard = epoll::create(CreateFlags::CLOEXEC)?;
    for event in lines.iter().flat_map(|line| [&line.call, &line.failed]) {
        epoll::add(&heard, descriptor_of(event), EventData::new_u64(0), EventFlags::IN)?;
    }
    Ok(heard)
}

impl Device for KernelNet {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.config.features(Offloads::ALL)
    }

    fn requirements(&self) -> &'static [(u32, u32)] {
        &REQUIREMENTS
    }

    fn queues(&self) -> usize {
        QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// Passes on who has to know what.
    fn serve(&mut self, queue: usize, ring: &mut Running<'_>, features: u64) -> Result<bool, Malformed> {
        let Some(kernel) = &self.kernel else { return Ok(false) };
        if self.lines.iter().all(|line| !line.at_work) {
            kernel.accept(features)?;
        }
        let Some(line) = self.lines.get_mut(queue) else { return Ok(false) };
        if line.failed.read().is_ok() {
            return Err(Malformed("a buffer or a queue is not what vhost-net can use"));
        }
        if !line.at_work {
            kernel.begin(queue, line, ring)?;
            line.at_work = true;
        }
        if line.call.read().is_ok() {
            ring.interrupt();
        }
        // Also where it is the kernel that has woken this thread: nobody counts who has been told of what.
        if ring.is_awaited()? {
            // Fails only where the counter is full, which wakes the kernel as well.
            let _ = line.kick.write(1);
        }
        Ok(false)
    }

    fn settle(&mut self, queue: usize, ring: &mut Running<'_>) -> Result<(), Malformed> {
        let Some(next) = self.take_back(queue)? else { return Ok(()) };
        if self.lines[queue].call.read().is_ok() {
            ring.interrupt();
        }
        ring.go_on_from(next)
    }

    /// One that the kernel does not give back ends with its device.
    fn stop(&mut self, queue: usize) {
        let _ = self.take_back(queue);
        if let Some(line) = self.lines.get(queue) {
            let _ = (line.call.read(), line.failed.read());
        }
    }

    fn ended(&mut self) -> Option<Arc<OwnedFd>> {
        self.lines.iter().any(|line| line.at_work).then(|| self.heard.clone())
    }

    /// The frames that wait are lost, as on a cable that was pulled.
    fn reset(&mut self) {
        (0..QUEUES).for_each(|queue| self.stop(queue));
        if let Some(kernel) = &self.kernel {
            kernel.port.set_takes(Offloads::NONE);
            kernel.port.discard();
        }
    }

    fn end(&mut self) {
        self.reset();
        self.kernel = None;
    }
}
