//! Threads whose stacks lie side by side in a few mappings.
//!
//! A thread of the standard library's takes four mappings of the process: its stack, one for signal handlers, and a guard page
//! of each. With thousands of machines that is what making the next one costs: KVM has the kernel lock every
//! mapping of the process one by one when a virtual machine is made (`mm_take_all_locks`). Here 64 stacks are one
//! mapping, if the kernel has guard pages that need none of their own (Linux 6.13).
#![allow(unsafe_code, reason = "threads on stacks of our own")]

use std::ffi::{CString, c_void};
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// How large a stack is. Pages of it that are never used take no memory.
const STACK: usize = 1 << 20;
/// How many stacks are one mapping; as many as a word has bits.
const STACKS: usize = u64::BITS as usize;
/// `MADV_GUARD_INSTALL` (Linux, `include/uapi/asm-generic/mman-common.h`).
const MADV_GUARD_INSTALL: libc::c_int = 102;

/// The stacks of the threads of one [`Kvm`](crate::Kvm)'s machines. Gives back what none uses.
#[derive(Debug, Default)]
pub(crate) struct Stacks(Mutex<Vec<Weak<Block>>>);

impl Stacks {
    /// A stack that nobody uses.
    fn take(&self) -> io::Result<Stack> {
        let mut blocks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.retain(|block| block.strong_count() > 0);
        let free = blocks.iter().filter_map(Weak::upgrade).find_map(|block| block.take());
        let stack = match free {
            Some(stack) => stack,
            None => {
                let block = Arc::new(Block::map()?);
                blocks.push(Arc::downgrade(&block));
                block.take().ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?
            }
        };
        // Now and not when the block is mapped, of which most may never be used. To do it again changes nothing.
        guard(stack.block.stack(stack.n))?;
        Ok(stack)
    }
}

/// Stacks in one mapping. The lowest page of each is its guard.
#[derive(Debug)]
struct Block {
    start: *mut u8,
    /// A bit for each stack that is in use.
    used: Mutex<u64>,
}

// SAFETY: the pointer is that of a mapping, which may be used and unmapped from any thread.
unsafe impl Send for Block {}
// SAFETY: as above; what changes is behind a lock.
unsafe impl Sync for Block {}

impl Block {
    fn map() -> io::Result<Self> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let flags = kind | libc::MAP_NORESERVE | libc::MAP_STACK;
        // SAFETY: a new mapping, wherever there is room.
        let start = unsafe { libc::mmap(ptr::null_mut(), STACK * STACKS, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let block = Self { start: start.cast(), used: Mutex::new(0) };
        // A huge page would be the whole of two stacks. A kernel that has none refuses, and is right.
        // SAFETY: the mapping is the block's own.
        unsafe { libc::madvise(start, STACK * STACKS, libc::MADV_NOHUGEPAGE) };
        Ok(block)
    }

    fn stack(&self, n: usize) -> *mut u8 {
        self.start.wrapping_add(n * STACK)
    }

    fn take(self: &Arc<Self>) -> Option<Stack> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let n = used.trailing_ones() as usize;
        (n < STACKS).then(|| {
            *used |= 1 << n;
            Stack { block: self.clone(), n }
        })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: nobody has a stack in it any more, since each keeps the block.
        unsafe { libc::munmap(self.start.cast(), STACK * STACKS) };
    }
}

/// Makes the page at `start` one that cannot be used.
fn guard(start: *mut u8) -> io::Result<()> {
    let page = page_size();
    // SAFETY: the page is the block's own and nobody uses it.
    unsafe {
        if libc::madvise(start.cast(), page, MADV_GUARD_INSTALL) == 0
            || libc::mprotect(start.cast(), page, libc::PROT_NONE) == 0
        {
            return Ok(());
        }
    }
    Err(io::Error::last_os_error())
}

fn page_size() -> usize {
    // SAFETY: it only tells a number.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Has the calling thread take no processor from others as soon as it is woken, but wait for one that is free, or until
/// it is its turn. Where the embedder has chosen another policy than the usual one, that stays.
///
/// Where processors are rare, who moves frames would else be woken, and have the guest interrupted, for each.
pub(crate) fn let_others_go_on() {
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: the calling thread's own policy, with a valid parameter.
    let done = unsafe {
        libc::sched_getscheduler(0) != libc::SCHED_OTHER
            || libc::sched_setscheduler(0, libc::SCHED_BATCH, &priority) == 0
    };
    if !done {
        tracing::debug!(error = %io::Error::last_os_error(), "a thread's scheduling stays as it is");
    }
}

/// A stack in use.
#[derive(Debug)]
struct Stack {
    block: Arc<Block>,
    n: usize,
}

impl Drop for Stack {
    /// Gives its memory back, so that the next thread finds zeroes.
    fn drop(&mut self) {
        let page = page_size();
        let usable = self.block.stack(self.n).wrapping_add(page);
        // SAFETY: the stack is this one's alone, and its thread has ended.
        unsafe { libc::madvise(usable.cast(), STACK - page, libc::MADV_DONTNEED) };
        *self.block.used.lock().unwrap_or_else(PoisonError::into_inner) &= !(1 << self.n);
    }
}

/// A thread that was started here. One that is dropped and not [joined](Self::join) goes on, and its stack stays.
#[derive(Debug)]
pub(crate) struct Thread {
    id: libc::pthread_t,
    stack: ManuallyDrop<Stack>,
}

/// What a thread begins with.
struct Start {
    name: CString,
    body: Box<dyn FnOnce() + Send>,
}

impl Thread {
    /// Starts a thread of this name, of which the kernel keeps 15 bytes. A panic in it ends it and nothing else.
    pub(crate) fn spawn(
        stacks: &Stacks,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let stack = stacks.take()?;
        let name = CString::new(name.as_bytes().iter().copied().take(15).collect::<Vec<_>>())?;
        let mut attributes = Attributes::new()?;
        attributes.set_stack(&stack)?;
        let start = Box::into_raw(Box::new(Start { name, body: Box::new(body) }));
        let mut id = MaybeUninit::uninit();
        // SAFETY: the attributes are initialised, the stack is in no other use until the thread has been joined, and
        // `run` takes what it is given back into a box, once.
        let failed = unsafe { libc::pthread_create(id.as_mut_ptr(), &attributes.0, run, start.cast()) };
        if failed != 0 {
            // SAFETY: no thread has been made that could have taken it.
            drop(unsafe { Box::from_raw(start) });
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: it was initialised, since the thread was made.
        Ok(Self { id: unsafe { id.assume_init() }, stack: ManuallyDrop::new(stack) })
    }

    /// The system's name for it, valid until it has been joined.
    pub(crate) fn id(&self) -> libc::pthread_t {
        self.id
    }

    /// Waits for its end.
    pub(crate) fn join(mut self) {
        // SAFETY: it has been neither joined nor detached: `self` is given up here.
        let failed = unsafe { libc::pthread_join(self.id, ptr::null_mut()) };
        if failed == 0 {
            // SAFETY: it is not used after this: `self` is forgotten.
            unsafe { ManuallyDrop::drop(&mut self.stack) };
        }
        std::mem::forget(self);
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // SAFETY: it has been neither joined nor detached.
        unsafe { libc::pthread_detach(self.id) };
    }
}

extern "C" fn run(start: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` gives each thread a box of its own.
    let Start { name, body } = *unsafe { Box::from_raw(start.cast::<Start>()) };
    // SAFETY: the name is a text, and this thread runs.
    unsafe { libc::pthread_setname_np(libc::pthread_self(), name.as_ptr()) };
    // What a panic is to lead to is the body's business. It has been reported.
    drop(catch_unwind(AssertUnwindSafe(body)));
    ptr::null_mut()
}

struct Attributes(libc::pthread_attr_t);

impl Attributes {
    fn new() -> io::Result<Self> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: it initialises what it is given, or says that it failed.
        match unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) } {
            // SAFETY: initialised above.
            0 => Ok(Self(unsafe { attributes.assume_init() })),
            failed => Err(io::Error::from_raw_os_error(failed)),
        }
    }

    fn set_stack(&mut self, stack: &Stack) -> io::Result<()> {
        let page = page_size();
        let usable = stack.block.stack(stack.n).wrapping_add(page);
        // SAFETY: the attributes are initialised, and the memory is the stack's.
        match unsafe { libc::pthread_attr_setstack(&mut self.0, usable.cast(), STACK - page) } {
            0 => Ok(()),
            failed => Err(io::Error::from_raw_os_error(failed)),
        }
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: they were initialised.
        unsafe { libc::pthread_attr_destroy(&mut self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn stacks_are_used_again_and_given_back() {
        let stacks = Stacks::default();
        let place = |stack: &Stack| stack.block.stack(stack.n) as usize;
        let mut taken: Vec<Stack> = (0..=STACKS).map(|_| stacks.take().unwrap()).collect();
        let mut places: Vec<usize> = taken.iter().map(place).collect();
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= STACK), "each has its own");
        let freed = taken.remove(5);
        let was = place(&freed);
        drop(freed);
        assert_eq!(place(&stacks.take().unwrap()), was);
        let blocks: Vec<_> = stacks.0.lock().unwrap().clone();
        assert_eq!(blocks.len(), 2);
        drop(taken);
        assert!(blocks.iter().all(|block| block.upgrade().is_none()));
    }

    #[test]
    fn the_next_thread_finds_zeroes() {
        let stacks = Stacks::default();
        let _keeps_the_block = stacks.take().unwrap();
        let stack = stacks.take().unwrap();
        let byte = stack.block.stack(stack.n).wrapping_add(STACK - 1);
        // SAFETY: the stack is taken, and no thread runs on it.
        unsafe { byte.write(1) };
        drop(stack);
        let stack = stacks.take().unwrap();
        assert_eq!(stack.block.stack(stack.n).wrapping_add(STACK - 1), byte);
        // SAFETY: as above.
        assert_eq!(unsafe { byte.read() }, 0);
    }

    #[test]
    fn a_thread_runs_under_its_name_and_ends() {
        let stacks = Stacks::default();
        let (tell, told) = mpsc::channel();
        let thread = Thread::spawn(&stacks, "a name of more than 15 bytes", move || {
            let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
            tell.send(name).unwrap();
        });
        let thread = thread.unwrap();
        assert_eq!(told.recv().unwrap(), "a name of more \n");
        thread.join();
        // Nothing of it is left that would send.
        assert!(told.recv().is_err());
    }

    #[test]
    fn who_lets_others_go_on_keeps_to_what_the_embedder_chose() {
        for (chosen, expect) in [(libc::SCHED_OTHER, libc::SCHED_BATCH), (libc::SCHED_IDLE, libc::SCHED_IDLE)]
        {
            let policy = std::thread::spawn(move || {
                let priority = libc::sched_param { sched_priority: 0 };
                // SAFETY: the thread's own policy, with a valid parameter.
                assert_eq!(unsafe { libc::sched_setscheduler(0, chosen, &priority) }, 0);
                let_others_go_on();
                // SAFETY: it only tells a number.
                unsafe { libc::sched_getscheduler(0) }
            });
            assert_eq!(policy.join().unwrap(), expect);
        }
    }

    #[test]
    fn a_panic_ends_its_thread_alone() {
        let stacks = Stacks::default();
        Thread::spawn(&stacks, "panics", || panic!("as it should")).unwrap().join();
        let used: Vec<_> = stacks.0.lock().unwrap().iter().filter_map(Weak::upgrade).collect();
        assert!(used.is_empty(), "its stack is given back");
    }

    #[test]
    fn a_stack_ends_with_a_page_that_cannot_be_used() {
        let stacks = Stacks::default();
        let stack = stacks.take().unwrap();
        let guard = stack.block.stack(stack.n);
        // The kernel reads the byte for us, and fails where we would be killed.
        let file = tempfile::tempfile().unwrap();
        let write = |at: *mut u8| {
            // SAFETY: the kernel looks at the address before it reads there.
            let done = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&file), at.cast(), 1) };
            if done == 1 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error()) }
        };
        assert_eq!(write(guard.wrapping_add(page_size())), Ok(()));
        for at in [0, page_size() - 1] {
            assert_eq!(write(guard.wrapping_add(at)), Err(Some(libc::EFAULT)));
        }
    }
}
