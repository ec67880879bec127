//! What serves a disk is chosen once, and told once.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use storage_block::{Engine, QueueOptions, RawFile};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use super::*;

/// Keeps what events say.
#[derive(Default, Clone)]
struct Events(Arc<Mutex<Vec<String>>>);

impl Subscriber for Events {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn a_disk_is_served_by_one_engine_whatever_its_driver_does() {
    // While there is one dispatcher alone, a place that another thread has told of first is silent for ever.
    let _other = tracing::Dispatch::new(Events::default());
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[ON_DISK; 1 << 20], 0).unwrap();
    let in_file = RawFile::from_file(file, false).unwrap().into_disk();
    let in_memory = MemoryDisk::from_vec(vec![ON_DISK; 1 << 20]).unwrap().into_disk();
    let ring = in_file.queue_with(&QueueOptions::new(1).engine(Engine::IoUring)).is_ok();
    let best = if ring { Engine::IoUring } else { Engine::Threads };
    for (disk, expect) in [(in_file, best), (in_memory, Engine::Threads)] {
        let events = Events::default();
        tracing::subscriber::with_default(events.clone(), || {
            let mut guest = Guest::new(&disk, 1, 0);
            for round in 0..3 {
                if round > 0 {
                    guest.0.begin(0);
                }
                guest.offer(0, 0, IN, 3);
                guest.serve(0, 1);
                assert_eq!(guest.data(0, 0), [ON_DISK; SECTOR]);
            }
        });
        let told: Vec<String> = events.0.lock().unwrap().clone();
        let told: Vec<&String> = told.iter().filter(|event| event.contains("is served")).collect();
        let [once] = &told[..] else { panic!("{told:?}") };
        assert!(once.contains(&format!("engine={expect:?}")) && once.contains("serial=vol-1"), "{once}");
    }
}
