//! The file of a saved machine: a header, the state, the memory.

use std::fs::File;
use std::num::NonZeroU32;
use std::os::unix::fs::FileExt;

use instance_core::machine::SavedMachine;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::State;
use crate::error::{HostContext, Result, host, saved};
use crate::memory::{self, Memory, PAGE};
use crate::virtio::Own;

const MAGIC: [u8; 8] = *b"AMI-KVM\n";
/// Counts up with every change of what a state is encoded as. All earlier ones are read.
pub(crate) const VERSION: u32 = 4;
/// Magic, version, checksum of the state (CRC-32C), length of the state, and from [`SPARE`] on zeroes.
pub(super) const HEADER_LEN: usize = 32;
const SPARE: usize = 24;
/// More than any machine's.
const STATE_MAX: u64 = 16 << 20;
/// How much of the memory is looked at and written at once.
const PIECE: usize = 1 << 20;

/// Writes a machine that stands still into an empty file.
pub(crate) fn write(to: &File, state: &State, memory: &Memory) -> Result<()> {
    const CONTEXT: &str = "the saved machine cannot be written";
    if to.metadata().host(CONTEXT)?.len() != 0 {
        return Err(host("the file for a saved machine is not empty")("it has bytes".into()));
    }
    let head = head(state)?;
    let start = memory_start(head.len() as u64);
    let len: u64 = memory.iter().map(|region| region.len()).sum();
    // Where nothing is written, zeroes are read.
    to.set_len(start + len).host(CONTEXT)?;
    to.write_all_at(&head, 0).host(CONTEXT)?;
    let mut at = start;
    for region in memory.iter() {
        let untouched = memory::Untouched::of(region);
        let mut piece = vec![0; PIECE];
        let mut offset = 0;
        while offset < region.len() {
            let piece = &mut piece[..(region.len() - offset).min(PIECE as u64) as usize];
            if !untouched.is(offset, piece.len()) {
                let address = GuestAddress(region.start_addr().0 + offset);
                memory.read_slice(piece, address).host("the guest's memory cannot be read")?;
                for (from, run) in runs(piece) {
                    to.write_all_at(run, at + offset + from as u64).host(CONTEXT)?;
                }
            }
            offset += piece.len() as u64;
        }
        at += region.len();
    }
    Ok(())
}

/// The stretches of pages that are not all zero, and where they begin.
fn runs(piece: &[u8]) -> Vec<(usize, &[u8])> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let mut runs: Vec<(usize, &[u8])> = Vec::new();
    for (n, page) in piece.chunks(PAGE).enumerate().filter(|(_, page)| !is_zero(page)) {
        match runs.last_mut() {
            Some((from, run)) if *from + run.len() == n * PAGE => *run = &piece[*from..n * PAGE + page.len()],
            _ => runs.push((n * PAGE, page)),
        }
    }
    runs
}

/// The header and the state.
fn head(state: &State) -> Result<Vec<u8>> {
    let body = encode(state)?;
    let mut head = Vec::with_capacity(HEADER_LEN + body.len());
    head.extend(MAGIC);
    head.extend(VERSION.to_le_bytes());
    head.extend(crc32c::crc32c(&body).to_le_bytes());
    head.extend((body.len() as u64).to_le_bytes());
    head.resize(HEADER_LEN, 0);
    head.extend(body);
    Ok(head)
}

/// Where the memory begins behind so many bytes of header and state.
fn memory_start(head: u64) -> u64 {
    head.next_multiple_of(PAGE as u64)
}

/// A saved machine that was read, but for its memory.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) state: State,
    /// Of its format.
    pub(crate) version: u32,
    /// Where the memory begins in the file.
    memory_at: u64,
}

impl Loaded {
    /// Reads and checks header and state.
    pub(crate) fn read(from: &SavedMachine) -> Result<Self> {
        let unreadable = |e: std::io::Error| saved("the saved machine cannot be read").with_source(e);
        let mut header = [0; HEADER_LEN];
        from.file().read_exact_at(&mut header, 0).map_err(unreadable)?;
        let (version, len, checksum) = check_header(&header)?;
        if len > STATE_MAX {
            return Err(saved("the saved machine's state is longer than any can be"));
        }
        let mut body = vec![0; len as usize];
        from.file().read_exact_at(&mut body, HEADER_LEN as u64).map_err(unreadable)?;
        if crc32c::crc32c(&body) != checksum {
            return Err(saved("the saved machine is damaged: the checksum of its state is another"));
        }
        let state = decode(version, &body)?;
        let loaded = Self { state, version, memory_at: memory_start(HEADER_LEN as u64 + len) };
        if from.len() != loaded.memory_at + (u64::from(loaded.state.memory_mib) << 20) {
            return Err(saved("the saved machine is not complete: its file has another length"));
        }
        Ok(loaded)
    }

    /// Maps the memory, privately: what the guest does not touch is not read, what it writes is its own.
    pub(crate) fn memory(&self, from: &SavedMachine) -> Result<Memory> {
        let mib = NonZeroU32::new(self.state.memory_mib).ok_or_else(|| saved("it has no memory"))?;
        memory::map(from.file(), self.memory_at, mib)
    }
}

/// The version, and the length and the checksum of the state.
fn check_header(header: &[u8; HEADER_LEN]) -> Result<(u32, u64, u32)> {
    let (magic, rest) = header.split_at(MAGIC.len());
    let word = |at: usize| rest[at..at + 4].iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
    if magic != MAGIC {
        return Err(saved("this is no saved machine of KVM"));
    }
    let version = word(0);
    if !(1..=VERSION).contains(&version) {
        return Err(saved(format!(
            "the saved machine has format {version}; this version reads those up to {VERSION}"
        )));
    }
    if header[SPARE..].iter().any(|byte| *byte != 0) {
        return Err(saved("the saved machine has something in the bytes of its header that mean nothing"));
    }
    Ok((version, u64::from(word(8)) | u64::from(word(12)) << 32, word(4)))
}

/// The bytes of a state: what version 1 has, and behind it what has come since.
pub(crate) fn encode(state: &State) -> Result<Vec<u8>> {
    const CONTEXT: &str = "the machine's state cannot be encoded";
    let own: Vec<&Own> = state.virtio.iter().map(|device| device.state.own()).collect();
    let bytes = postcard::to_stdvec(state).host(CONTEXT)?;
    postcard::to_extend(&(own, &state.gone, state.speed), bytes).host(CONTEXT)
}

/// The state of bytes of a version, which may be anybody's.
pub(crate) fn decode(version: u32, body: &[u8]) -> Result<State> {
    let unreadable = |e: postcard::Error| saved("the saved machine's state cannot be decoded").with_source(e);
    let (mut state, mut rest) = postcard::take_from_bytes::<State>(body).map_err(unreadable)?;
    if version >= 2 {
        let own: Vec<Own>;
        ((own, state.gone), rest) = postcard::take_from_bytes(rest).map_err(unreadable)?;
        if own.len() != state.virtio.len() {
            return Err(saved("the saved machine's devices do not remember one thing each"));
        }
        if own.iter().any(|own| own.since() > version) {
            return Err(saved("the saved machine's devices remember what is not of its version"));
        }
        state.virtio.iter_mut().zip(own).for_each(|(device, own)| device.state.set_own(own));
    }
    if version >= 3 {
        (state.speed, rest) = postcard::take_from_bytes(rest).map_err(unreadable)?;
    }
    if rest.is_empty() { Ok(state) } else { Err(saved("the saved machine's state is longer than it says")) }
}
