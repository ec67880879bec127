//! Which system calls the threads of a machine may make, where they are confined.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_bindings::{KVMIO, kvm_ioeventfd, kvm_irq_level, kvm_msi, kvm_regs, kvm_signal_mask, kvm_sregs};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use crate::error::{HostContext, Result};
use crate::kick;

/// What the threads of a machine are confined to, for [`Kvm::with_confinement`](crate::Kvm::with_confinement):
/// the system calls that they need, each kind of thread its own.
///
/// A call that is not among them fails with `EPERM` and does nothing; the thread goes on. It is not killed: a
/// thread that vanishes would leave its machine standing for ever, and a process that is killed is the
/// embedder's. Only a call by the interface of 32-bit programs ends the process, by Linux's own rules for such filters.
///
/// The threads that processors run in can make KVM run, interrupt and kick; those of devices can besides
/// that work on files and sockets: open, make, lock, rename and remove files and directories, as volumes do with their own.
/// What of the embedder's own code runs in them is confined with them: disks of its own, hooks on states,
/// subscribers of `tracing`. If these need more, they are given it:
///
/// ```
/// use hypervisor_kvm::{Confinement, Kvm};
///
/// let confinement = Confinement::new().allow_devices([libc::SYS_connect, libc::SYS_socket]);
/// if let Ok(kvm) = Kvm::open() {
///     let kvm = kvm.with_confinement(confinement); // and from here on as ever
/// #   drop(kvm);
/// }
/// ```
///
/// The threads that serve the requests of disks are confined as the thread of their device, which starts them. They
/// serve all requests: io_uring is not allowed, since what a ring is asked for passes by every filter. So a device's thread
/// may start threads, and with them processes, which no filter tells apart; they are confined as it is. Threads that a disk
/// has started by itself are not confined, and those that call this library never are.
#[derive(Debug, Clone, Default)]
pub struct Confinement {
    processors: Vec<i64>,
    devices: Vec<i64>,
}

impl Confinement {
    /// What a machine's own code needs, with the disks of `storage-block`.
    pub fn new() -> Self {
        Self::default()
    }

    /// These calls too for processors' threads, by their numbers, whatever their arguments.
    #[must_use]
    pub fn allow_processors(mut self, calls: impl IntoIterator<Item = i64>) -> Self {
        self.processors.extend(calls);
        self
    }

    /// These calls too for the threads of disks and network ports, by their numbers, whatever their arguments.
    #[must_use]
    pub fn allow_devices(mut self, calls: impl IntoIterator<Item = i64>) -> Self {
        self.devices.extend(calls);
        self
    }

    /// The filters.
    pub(crate) fn compile(&self) -> Result<Filters> {
        let processors = [COMMON, PROCESSOR].concat();
        let devices = [COMMON, DEVICE].concat();
        Ok(Filters {
            processor: Arc::new(program(
                &processors,
                &[PROCESSOR_IOCTLS, NET_IOCTLS].concat(),
                &self.processors,
            )?),
            device: Arc::new(program(
                &devices,
                &[DEVICE_IOCTLS, NET_IOCTLS, VHOST_IOCTLS].concat(),
                &self.devices,
            )?),
        })
    }
}

/// The filters of a machine's threads.
#[derive(Debug)]
pub(crate) struct Filters {
    pub(crate) processor: Filter,
    pub(crate) device: Filter,
}

/// A filter that threads put on themselves.
pub(crate) type Filter = Arc<BpfProgram>;

/// Confines the calling thread, for ever.
pub(crate) fn enter(filter: &Filter) -> Result<()> {
    seccompiler::apply_filter(filter).host("the host's kernel did not confine a thread")
}

/// A call, and under which condition it may be made.
type Allowed = (i64, When);

#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    /// None of these bits is set in the argument of this number.
    Without(u8, u64),
    /// All of them are.
    With(u8, u64),
    /// It is this.
    Equal(u8, u64),
    /// To kick a thread of this process.
    Kick,
}

/// Memory that is made executable.
const NOT_EXECUTABLE: When = When::Without(2, libc::PROT_EXEC as u64);

/// What each thread needs to live and to end: locks, memory, descriptors that wake others, time. What is
/// written to open files besides is mostly what a subscriber of `tracing` says.
const COMMON: &[Allowed] = &[
    (libc::SYS_brk, When::Always),
    (libc::SYS_clock_gettime, When::Always),
    (libc::SYS_clock_nanosleep, When::Always),
    (libc::SYS_close, When::Always),
    (libc::SYS_exit, When::Always),
    (libc::SYS_futex, When::Always),
    (libc::SYS_getpid, When::Always),
    (libc::SYS_getrandom, When::Always),
    (libc::SYS_gettid, When::Always),
    (libc::SYS_madvise, When::Always),
    (libc::SYS_mmap, NOT_EXECUTABLE),
    (libc::SYS_mprotect, NOT_EXECUTABLE),
    (libc::SYS_mremap, When::Always),
    (libc::SYS_munmap, When::Always),
    (libc::SYS_nanosleep, When::Always),
    (libc::SYS_poll, When::Always),
    (libc::SYS_ppoll, When::Always),
    (libc::SYS_read, When::Always),
    (libc::SYS_readv, When::Always),
    (libc::SYS_restart_syscall, When::Always),
    (libc::SYS_rt_sigprocmask, When::Always),
    (libc::SYS_rt_sigreturn, When::Always),
    (libc::SYS_sched_getaffinity, When::Always),
    (libc::SYS_sched_yield, When::Always),
    (libc::SYS_sigaltstack, When::Always),
    (libc::SYS_tgkill, When::Kick),
    (libc::SYS_timerfd_settime, When::Always),
    (libc::SYS_write, When::Always),
    (libc::SYS_writev, When::Always),
];

const PROCESSOR: &[Allowed] = &[(libc::SYS_rt_sigtimedwait, When::Always)];

/// What disks and network ports of this library's do. A thread that they start has the filter of who starts it.
const DEVICE: &[Allowed] = &[
    (libc::SYS_clone, When::With(0, libc::CLONE_THREAD as u64)),
    // Its flags lie in memory, where no filter looks. What it makes is confined likewise.
    (libc::SYS_clone3, When::Always),
    (libc::SYS_epoll_create1, When::Always),
    (libc::SYS_epoll_ctl, When::Always),
    (libc::SYS_eventfd2, When::Always),
    (libc::SYS_fallocate, When::Always),
    (libc::SYS_fcntl, When::Equal(1, libc::F_DUPFD_CLOEXEC as u64)),
    (libc::SYS_fdatasync, When::Always),
    (libc::SYS_flock, When::Always),
    (libc::SYS_fstat, When::Always),
    (libc::SYS_fsync, When::Always),
    (libc::SYS_ftruncate, When::Always),
    (libc::SYS_getdents64, When::Always),
    (libc::SYS_lseek, When::Always),
    // Volumes make, lock, rename and remove files of their own: they begin with the first write, their logs with the first
    // flush.
    (libc::SYS_mkdir, When::Always),
    (libc::SYS_mkdirat, When::Always),
    (libc::SYS_openat, When::Always),
    (libc::SYS_prctl, When::Equal(0, libc::PR_SET_NAME as u64)),
    (libc::SYS_pread64, When::Always),
    (libc::SYS_preadv, When::Always),
    (libc::SYS_preadv2, When::Always),
    (libc::SYS_pwrite64, When::Always),
    (libc::SYS_pwritev, When::Always),
    (libc::SYS_pwritev2, When::Always),
    (libc::SYS_readlink, When::Always),
    (libc::SYS_readlinkat, When::Always),
    (libc::SYS_recvfrom, When::Always),
    (libc::SYS_recvmsg, When::Always),
    (libc::SYS_rename, When::Always),
    (libc::SYS_renameat, When::Always),
    (libc::SYS_renameat2, When::Always),
    (libc::SYS_rmdir, When::Always),
    (libc::SYS_rseq, When::Always),
    (libc::SYS_sendmsg, When::Always),
    (libc::SYS_sendto, When::Always),
    (libc::SYS_set_robust_list, When::Always),
    (libc::SYS_statx, When::Always),
    (libc::SYS_sync_file_range, When::Always),
    (libc::SYS_timerfd_create, When::Always),
    (libc::SYS_unlink, When::Always),
    (libc::SYS_unlinkat, When::Always),
];

/// A call of a driver's: direction, type, number, size of the argument.
type DriverCall = (u32, u32, u32, usize);

/// One of KVM's (Linux, `include/uapi/linux/kvm.h`).
const fn kvm(direction: u32, number: u32, size: usize) -> DriverCall {
    (direction, KVMIO, number, size)
}

/// A device's interrupt on virtio-mmio.
const IRQ_LINE: DriverCall = kvm(_IOC_WRITE, 0x61, size_of::<kvm_irq_level>());
/// The same on PCI.
const SIGNAL_MSI: DriverCall = kvm(_IOC_WRITE, 0xa5, size_of::<kvm_msi>());

/// What the drivers behind TAP devices and vhost-net are asked for by whoever resets, stops or serves a network port.
const NET_IOCTLS: &[DriverCall] = &[
    (_IOC_WRITE, TUN, 208, size_of::<libc::c_uint>()), // TUNSETOFFLOAD
    (_IOC_READ | _IOC_WRITE, VHOST, 0x12, 8),          // VHOST_GET_VRING_BASE
    (_IOC_WRITE, VHOST, 0x30, 8),                      // VHOST_NET_SET_BACKEND
];

/// What vhost-net is asked for when a queue is given to it (Linux, `include/uapi/linux/vhost.h`).
const VHOST_IOCTLS: &[DriverCall] = &[
    (_IOC_WRITE, VHOST, 0x00, 8),  // VHOST_SET_FEATURES
    (_IOC_WRITE, VHOST, 0x10, 8),  // VHOST_SET_VRING_NUM
    (_IOC_WRITE, VHOST, 0x11, 40), // VHOST_SET_VRING_ADDR
    (_IOC_WRITE, VHOST, 0x12, 8),  // VHOST_SET_VRING_BASE
    (_IOC_WRITE, VHOST, 0x20, 8),  // VHOST_SET_VRING_KICK
    (_IOC_WRITE, VHOST, 0x21, 8),  // VHOST_SET_VRING_CALL
    (_IOC_WRITE, VHOST, 0x22, 8),  // VHOST_SET_VRING_ERR
];

const TUN: u32 = b'T' as u32;
const VHOST: u32 = 0xaf;

const PROCESSOR_IOCTLS: &[DriverCall] = &[
    kvm(_IOC_NONE, 0x80, 0),                             // KVM_RUN
    kvm(_IOC_READ, 0x81, size_of::<kvm_regs>()),         // KVM_GET_REGS
    kvm(_IOC_READ, 0x83, size_of::<kvm_sregs>()),        // KVM_GET_SREGS
    kvm(_IOC_WRITE, 0x8b, size_of::<kvm_signal_mask>()), // KVM_SET_SIGNAL_MASK
    kvm(_IOC_NONE, 0xad, 0),                             // KVM_KVMCLOCK_CTRL
    IRQ_LINE,
    kvm(_IOC_WRITE, 0x79, size_of::<kvm_ioeventfd>()), // KVM_IOEVENTFD, where a guest moves a PCI device
    SIGNAL_MSI,
];

const DEVICE_IOCTLS: &[DriverCall] = &[IRQ_LINE, SIGNAL_MSI];

/// Compiles a filter.
fn program(allowed: &[Allowed], ioctls: &[DriverCall], more: &[i64]) -> Result<BpfProgram> {
    let build = || -> Result<BpfProgram, seccompiler::Error> {
        let mut rules = BTreeMap::new();
        for (call, when) in allowed {
            rules.insert(*call, when.rules()?);
        }
        let ioctls = ioctls.iter().map(|(direction, kind, number, size)| {
            let command = ioctl_expr(*direction, *kind, *number, *size as u32);
            Ok(SeccompRule::new(vec![equal(1, command)?])?)
        });
        rules.insert(libc::SYS_ioctl, ioctls.collect::<Result<_, seccompiler::Error>>()?);
        rules.extend(more.iter().map(|call| (*call, Vec::new())));
        let refused = SeccompAction::Errno(libc::EPERM as u32);
        let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?;
        Ok(filter.try_into()?)
    };
    build().host("the filter for a machine's threads cannot be compiled")
}

impl When {
    /// A call is let through if one of its rules says so, or if it has none.
    fn rules(self) -> Result<Vec<SeccompRule>, seccompiler::Error> {
        let conditions = match self {
            Self::Always => return Ok(Vec::new()),
            Self::Without(argument, bits) => {
                let none = SeccompCmpOp::MaskedEq(bits);
                vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, none, 0)?]
            }
            Self::With(argument, bits) => {
                let all = SeccompCmpOp::MaskedEq(bits);
                vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, all, bits)?]
            }
            Self::Equal(argument, value) => vec![equal(argument, value)?],
            Self::Kick => vec![equal(0, std::process::id().into())?, equal(2, kick::SIGNAL as u64)?],
        };
        Ok(vec![SeccompRule::new(conditions)?])
    }
}

fn equal(argument: u8, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}
