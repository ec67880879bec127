//! The fake guest, which speaks the conformance guest's protocol.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use storage_block::SECTOR;

use super::machine::{Signals, exit, lock};
use super::memory::{self, Memory};
use super::streams::FakeStreams;
use crate::console::ConsolePort;
use crate::machine::{DiskSpec, ExitCause, MachineState, NetSpec};
use crate::net::Frame;
use crate::testing::ping::Station;
use crate::watch::Publisher;

/// A network port in use.
pub(super) struct FakePort(pub(super) NetSpec);

impl FakePort {
    /// Answers a frame as who has `address`; says whether there was one.
    fn serve(&self, memory: &memory::Port) -> bool {
        let Some(address) = memory.address else { return false };
        let Some(frame) = self.0.port.recv() else { return false };
        let own = Station { mac: self.0.mac, address };
        if let Some(answer) = own.answer(&frame.data) {
            // Lost where there is no room, as on any network.
            let _ = self.0.port.send(Frame::new(answer));
        }
        true
    }
}

impl Drop for FakePort {
    fn drop(&mut self) {
        self.0.port.set_waker(None);
    }
}

pub(super) struct FakeGuest {
    pub(super) state: Arc<Publisher<MachineState>>,
    pub(super) signals: Arc<Signals>,
    pub(super) power_button: Arc<AtomicBool>,
    pub(super) busy: Arc<Mutex<()>>,
    pub(super) console: ConsolePort,
    pub(super) disks: Arc<Mutex<Vec<DiskSpec>>>,
    pub(super) memory: Arc<Mutex<Memory>>,
    /// Plugged in for as long as it runs.
    pub(super) nets: Vec<FakePort>,
    pub(super) streams: Option<FakeStreams>,
}

impl FakeGuest {
    pub(super) fn run(self) {
        if !std::mem::replace(&mut lock(&self.memory).booted, true) {
            self.console.write_output(b"GUEST READY\n");
        }
        loop {
            match self.state.get() {
                MachineState::Exited(_) => return,
                MachineState::Running if self.power_button.load(Ordering::SeqCst) => {
                    return exit(&self.state, ExitCause::PowerOff);
                }
                MachineState::Running if self.serve() => {}
                _ => self.signals.wait(),
            }
        }
    }

    /// Handles one byte of input; says whether there was one.
    fn serve(&self) -> bool {
        let _busy = lock(&self.busy);
        if self.state.get() != MachineState::Running {
            return true;
        }
        let mut memory = lock(&self.memory);
        if self.nets.iter().zip(&memory.nets).any(|(net, memory)| net.serve(memory)) {
            return true;
        }
        if self.streams.as_ref().is_some_and(FakeStreams::serve) {
            return true;
        }
        let mut byte = [0];
        if self.console.read_input(&mut byte) == 0 {
            return false;
        }
        if !matches!(byte, [b'\n' | b'\r']) {
            memory.line.push(byte[0]);
        } else if !memory.line.is_empty() {
            let line = std::mem::take(&mut memory.line);
            if let Some(answer) = self.answer(&String::from_utf8_lossy(&line), &mut memory) {
                self.console.write_output(format!("{answer}\n").as_bytes());
            }
        }
        true
    }

    fn answer(&self, line: &str, memory: &mut Memory) -> Option<String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["ping", word] => format!("pong {word}"),
            ["cpus"] => format!("cpus {}", memory.vcpus),
            ["memory"] => format!("memory {}", memory.memory_mib),
            ["remember", word] => {
                memory.word = word.to_owned();
                "remembered".to_owned()
            }
            ["recall"] => format!("recalled {}", memory.word),
            ["disks"] => format!("disks {}", lock(&self.disks).len()),
            ["dmi", field] => format!("dmi {}", memory.dmi.get(field).map_or("", String::as_str)),
            ["size", d] => self.on(d, |disk| Ok(format!("size {}", disk.disk.size()))),
            ["serial", d] => self.on(d, |disk| Ok(format!("serial {}", disk.serial))),
            ["read", d, s] => self.on(d, |disk| read(disk, s)),
            ["write", d, s, word] => self.on(d, |disk| write(disk, s, word)),
            ["flush", d] => self.on(d, |disk| disk.disk.flush().map(|()| "flushed".to_owned())),
            ["nets"] => format!("nets {}", memory.nets.len()),
            ["mac", n] => memory.net(n).map_or_else(error, |net| format!("mac {}", net.mac)),
            ["mtu", n] => memory.net(n).map_or_else(error, |net| format!("mtu {}", net.mtu)),
            ["up", n, address] => match (memory.net(n), address.parse()) {
                (Some(net), Ok(address)) => {
                    net.address = Some(address);
                    self.take_up_nets();
                    "up".to_owned()
                }
                _ => error(),
            },
            ["poweroff"] => return self.end(ExitCause::PowerOff),
            ["reboot"] => return self.end(ExitCause::Reset),
            ["crash"] => return self.end(ExitCause::TripleFault(None)),
            ["panic"] => return self.end(ExitCause::Panic),
            ["spin"] => "spinning".to_owned(),
            _ => "unknown".to_owned(),
        };
        Some(answer)
    }

    /// Has frames wake the guest.
    pub(super) fn take_up_nets(&self) {
        for net in &self.nets {
            let signals = self.signals.clone();
            net.0.port.set_waker(Some(Arc::new(move || signals.raise())));
        }
    }

    /// Has packets wake the guest.
    pub(super) fn take_up_streams(&self) {
        if let Some(streams) = &self.streams {
            let signals = self.signals.clone();
            streams.port.set_waker(Some(Arc::new(move || signals.raise())));
        }
    }

    fn end(&self, cause: ExitCause) -> Option<String> {
        exit(&self.state, cause);
        None
    }

    fn on(&self, index: &str, act: impl FnOnce(&DiskSpec) -> storage_block::Result<String>) -> String {
        let disk = index.parse().ok().and_then(|i: usize| lock(&self.disks).get(i).cloned());
        disk.and_then(|d| act(&d).ok()).unwrap_or_else(error)
    }
}

fn error() -> String {
    "error".to_owned()
}

fn read(disk: &DiskSpec, sector: &str) -> storage_block::Result<String> {
    let mut bytes = [0; SECTOR as usize];
    disk.disk.read_at(&mut bytes, offset(sector))?;
    let word = bytes.split(|b| *b == 0).next().unwrap_or_default();
    Ok(format!("data {}", String::from_utf8_lossy(word)))
}

fn write(disk: &DiskSpec, sector: &str, word: &str) -> storage_block::Result<String> {
    let mut bytes = word.as_bytes().to_vec();
    bytes.resize(SECTOR as usize, 0);
    disk.disk.write_at(&bytes, offset(sector))?;
    Ok("wrote".to_owned())
}

/// The byte offset of a sector; one that is no number lies outside every disk.
fn offset(sector: &str) -> u64 {
    sector.parse::<u64>().ok().and_then(|s| s.checked_mul(SECTOR)).unwrap_or(u64::MAX)
}
