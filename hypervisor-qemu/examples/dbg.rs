#![allow(missing_docs, clippy::unwrap_used)]
#[path = "../tests/common/mod.rs"] mod common;
use instance_core::{console::Console, machine::*};
use std::time::*;
fn main() {
    let c = Console::new();
    let mut b = common::linux().unwrap();
    b.command_line = std::env::args().nth(2).unwrap_or("console=ttyS0 panic=-1".into());
    let mut s = common::spec(b, &c);
    s.memory_mib = 256.try_into().unwrap();
    s.vcpus = std::env::args().nth(1).unwrap().parse().unwrap();
    for n in ["a","b"] { s.disks.push(DiskSpec::new(storage_block::MemoryDisk::new(1<<20).unwrap().into_disk(), n)); }
    let t = Instant::now();
    let m = common::qemu().unwrap().create(s).unwrap();
    println!("create {:?}", t.elapsed());
    m.start().unwrap();
    let r = c.reader().wait_for("GUEST READY", Instant::now()+Duration::from_secs(15));
    println!("ready {:?} {:?}", t.elapsed(), r.is_ok());
    for d in [0u64, 3000] {
        std::thread::sleep(Duration::from_millis(d));
        m.power_button().unwrap();
        println!("{d} {:?}", m.state().wait(Instant::now()+Duration::from_secs(3), |s| s.exit_cause().is_some()));
    }
    println!("{}", String::from_utf8_lossy(&c.output()).lines().rev().take(12).collect::<Vec<_>>().join("\n"));
    for t in std::fs::read_dir("/proc/self/task").unwrap() { let p=t.unwrap().path(); println!("{} {} ", std::fs::read_to_string(p.join("comm")).unwrap().trim(), std::fs::read_to_string(p.join("wchan")).unwrap_or_default()); }
    if r.is_err() && std::env::args().nth(3).is_some() { let mut l=String::new(); std::io::stdin().read_line(&mut l).unwrap(); }
}
