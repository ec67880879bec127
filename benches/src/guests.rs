//! What only guests can tell of a network: how fast they speak with each other, and how soon they are answered.
//!
//! The guests are Debian's kernel with this very program as what it runs, on KVM in the lab. What is compared with
//! is done by the same code without a network of ours: in the lab itself, or in the guest alone.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ami_core::{Ami, X86_64};
use anyhow::{Context as _, anyhow, ensure};
use cpio::newc::{Builder, ModeFileType, trailer};
use hypervisor_kvm::Kvm;
use instance_core::{DirectBoot, ImageSource, Instance, LaunchSpec, Region, RegionOptions};
use network_vpc::{Direction, Network, Rule};
use storage_block::MemoryDisk;
use tempfile::TempDir;

use crate::launch;
use crate::samples::{Measurement, median};

/// The first word of this program's arguments where it is a guest's.
pub const IN_GUEST: &str = "in-guest";

const INIT: &str = include_str!("in_guest/init.sh");
const TYPE: &str = "t2.nano";
const PATIENCE: Duration = Duration::from_secs(60);
const PORT: u16 = 5001;
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const SERVER: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 10);
const CLIENT: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 11);

/// How much is sent at a time, how often it is sent, and how often before that, which does not count.
const BULK: usize = 4 << 20;
const WARM_UP: usize = 1;
const TIMES: usize = 3;
/// How often is asked.
const QUESTIONS: usize = 200;

/// What a guest says before what it has measured, in nanoseconds.
const TOOK: &str = "took ";
const READY: &str = "guest is ready";
const DONE: &str = "guest is done";

/// A region with a network in which guests run this program.
struct Guests {
    region: Region<Kvm>,
    network: Network,
    kernel: Vec<u8>,
    initrd: Vec<u8>,
    _dir: TempDir,
}

impl Guests {
    fn new() -> anyhow::Result<Self> {
        let kvm = launch::kvm_for_linux()?;
        let dir = tempfile::tempdir()?;
        let name = "us-east-1".parse()?;
        let network = Network::in_memory(&name)?;
        let options = RegionOptions::new().name(name).network(network.clone());
        let region = options.open(dir.path(), kvm)?;
        let (kernel, mut initrd) = (launch::artifact("vmlinuz")?, launch::artifact("conformance.img")?);
        // The kernel unpacks one archive over the other.
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        initrd.extend(own_archive()?);
        Ok(Self { region, network, kernel, initrd, _dir: dir })
    }

    /// Launches a guest that does `work`, in a group of its own that lets everybody in at the port.
    fn launch(&self, work: &str, address: Ipv4Addr) -> anyhow::Result<Instance> {
        let words = format!("console=ttyS0 quiet panic=-1 address={address} work={work}");
        let boot = DirectBoot::new(self.kernel.clone(), Some(self.initrd.clone()), words);
        let disk = MemoryDisk::new(1 << 20)?.into_disk();
        let image = self.region.register_image(
            Ami::<X86_64>::builder(format!("{work}-{address}")),
            ImageSource::new(&disk).boot(boot),
        )?;
        let group = self.network.create_security_group(self.network.default_vpc()?, work, "")?;
        let rule = Rule::tcp(PORT, "172.31.0.0/16".parse()?);
        self.network.authorize(group.id, Direction::Ingress, rule)?;
        let spec = LaunchSpec::new(TYPE.parse()?).private_ip(address).security_group(group.id);
        Ok(self.region.launch(&image, spec)?)
    }
}

/// What a guest has said until it said `text`.
fn heard(guest: &Instance, text: &str) -> anyhow::Result<String> {
    let console = guest.console();
    let waited = console.reader().wait_for(text, Instant::now() + PATIENCE);
    waited.with_context(|| format!("the guest says {:?}", String::from_utf8_lossy(&console.output())))?;
    Ok(String::from_utf8_lossy(&console.output()).into_owned())
}

/// The seconds that a guest has measured, of what it calls so.
fn taken(said: &str, what: &str) -> Vec<f64> {
    let lines = said.lines().filter_map(|line| line.trim().strip_prefix(TOOK)?.strip_prefix(what));
    lines.filter_map(|nanos| nanos.trim().parse().ok()).map(|nanos: f64| nanos / 1e9).collect()
}

/// TCP's bytes a second from a guest to another in its subnet, as a multiple of those over the loopback interface of
/// the machine that both run on.
///
/// # Errors
///
/// Where KVM runs no kernel, or a guest does not do its work.
pub fn tcp_guests_over_loopback() -> anyhow::Result<Measurement> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let at = listener.local_addr()?;
    std::thread::spawn(move || serve(&listener));
    let loopback = send_repeatedly(at)?;

    let guests = Guests::new()?;
    let server = guests.launch("serve", SERVER)?;
    heard(&server, READY)?;
    let client = guests.launch("send", CLIENT)?;
    let between = taken(&heard(&client, DONE)?, "bulk");
    ensure!(between.len() == TIMES, "a guest has sent {} times, not {TIMES}", between.len());
    let value = median(loopback.clone()) / median(between.clone());
    let samples = [("loopback".to_owned(), loopback), ("guests".to_owned(), between)].into();
    Ok(Measurement { value, noise: None, samples })
}

/// How many milliseconds later a guest is answered by the metadata service than by itself.
///
/// # Errors
///
/// As [`tcp_guests_over_loopback`].
pub fn metadata_beyond_loopback() -> anyhow::Result<Measurement> {
    let guests = Guests::new()?;
    let guest = guests.launch("ask", CLIENT)?;
    let said = heard(&guest, DONE)?;
    let (metadata, own) = (taken(&said, "metadata"), taken(&said, "loopback"));
    ensure!(metadata.len() == QUESTIONS && own.len() == QUESTIONS, "a guest was not answered: {said}");
    let value = (median(metadata.clone()) - median(own.clone())) * 1e3;
    let samples = [("metadata".to_owned(), metadata), ("loopback".to_owned(), own)].into();
    Ok(Measurement { value, noise: None, samples })
}

/// The whole of this program in a guest.
pub fn work_in_guest(work: &str) -> ExitCode {
    let done = match work {
        "serve" => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).map_err(Into::into).and_then(|listener| {
                println!("{READY}");
                serve(&listener)
            })
        }
        "send" => send_repeatedly((SERVER, PORT).into()).map(|times| {
            times.iter().for_each(|seconds| println!("{TOOK}bulk {}", seconds * 1e9));
        }),
        "ask" => ask_repeatedly(),
        work => Err(anyhow!("there is no work {work:?}")),
    };
    if let Err(error) = done {
        println!("error: {error:#}");
    }
    println!("{DONE}");
    ExitCode::SUCCESS
}

/// Takes what clients send, one after the other, and tells each when it has all.
fn serve(listener: &TcpListener) -> anyhow::Result<()> {
    let mut bytes = vec![0; 256 << 10];
    loop {
        let (mut client, _) = listener.accept()?;
        let mut left = BULK;
        while left > 0 {
            match client.read(&mut bytes)? {
                0 => break,
                read => left = left.saturating_sub(read),
            }
        }
        client.write_all(b".")?;
    }
}

/// The seconds that sending takes, until all has arrived.
fn send_repeatedly(to: SocketAddr) -> anyhow::Result<Vec<f64>> {
    let bytes = vec![b'x'; 256 << 10];
    let once = |_| {
        let mut server = TcpStream::connect(to)?;
        let begun = Instant::now();
        for _ in 0..BULK / bytes.len() {
            server.write_all(&bytes)?;
        }
        server.read_exact(&mut [0])?;
        anyhow::Ok(begun.elapsed().as_secs_f64())
    };
    let times = (0..WARM_UP + TIMES).map(once).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(times[WARM_UP..].to_vec())
}

/// Asks the metadata service and, for comparison, a server of the guest's own that says the same.
fn ask_repeatedly() -> anyhow::Result<()> {
    let mut service = BufReader::new(TcpStream::connect((METADATA, 80))?);
    service.get_ref().set_nodelay(true)?;
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60";
    let (_, token) = ask(&mut service, &format!("PUT /latest/api/token HTTP/1.1\r\n{ttl}\r\n\r\n"))?;
    let token = String::from_utf8(token)?;
    let header = format!("X-aws-ec2-metadata-token: {token}");
    let question = format!("GET /latest/meta-data/instance-id HTTP/1.1\r\n{header}\r\n\r\n");
    let (head, body) = ask(&mut service, &question)?;
    ensure!(body.starts_with(b"i-"), "the instance is told {:?}", String::from_utf8_lossy(&body));

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let at = listener.local_addr()?;
    let (asked, answer) = (question.len(), [head, body].concat());
    std::thread::spawn(move || -> std::io::Result<()> {
        let (mut client, _) = listener.accept()?;
        client.set_nodelay(true)?;
        let mut bytes = vec![0; asked];
        loop {
            client.read_exact(&mut bytes)?;
            client.write_all(&answer)?;
        }
    });
    let mut own = BufReader::new(TcpStream::connect(at)?);
    own.get_ref().set_nodelay(true)?;
    for (name, server) in [("metadata", &mut service), ("loopback", &mut own)] {
        let once = |_| {
            let begun = Instant::now();
            ask(server, &question)?;
            anyhow::Ok(begun.elapsed().as_nanos())
        };
        let times = (0..QUESTIONS).map(once).collect::<anyhow::Result<Vec<_>>>()?;
        times.iter().for_each(|nanos| println!("{TOOK}{name} {nanos}"));
    }
    Ok(())
}

/// Head and body of the answer to a request.
fn ask(server: &mut BufReader<TcpStream>, request: &str) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
    server.get_mut().write_all(request.as_bytes())?;
    let (mut head, mut length) = (Vec::new(), 0);
    loop {
        let mut line = String::new();
        ensure!(server.read_line(&mut line)? > 0, "the server has gone");
        head.extend(line.as_bytes());
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    server.read_exact(&mut body)?;
    Ok((head, body))
}

/// An archive with this program, the libraries that it runs with, and the script that starts it.
fn own_archive() -> anyhow::Result<Vec<u8>> {
    const INTERPRETER: &str = "/lib64/ld-linux-x86-64.so.2";
    let mut libraries: BTreeSet<PathBuf> = [PathBuf::from(INTERPRETER)].into();
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let path = line.split_whitespace().nth(5).map(Path::new);
        libraries.extend(path.filter(|path| path.to_string_lossy().contains(".so")).map(Path::to_owned));
    }
    let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    for library in libraries {
        files.insert(library.clone(), std::fs::read(&library)?);
    }
    files.insert("/measure".into(), std::fs::read("/proc/self/exe")?);
    files.insert("/init".into(), INIT.into());
    let (mut archive, mut dirs) = (Vec::new(), BTreeSet::new());
    for (path, content) in &files {
        let relative = path.strip_prefix("/")?;
        let parents: Vec<_> =
            relative.ancestors().skip(1).filter(|dir| !dir.as_os_str().is_empty()).collect();
        for dir in parents.into_iter().rev() {
            if dirs.insert(dir.to_owned()) {
                entry(&mut archive, dir, ModeFileType::Directory, &[])?;
            }
        }
        entry(&mut archive, relative, ModeFileType::Regular, content)?;
    }
    Ok(trailer(archive)?)
}

fn entry(archive: &mut Vec<u8>, path: &Path, kind: ModeFileType, content: &[u8]) -> anyhow::Result<()> {
    let header = Builder::new(&path.display().to_string()).nlink(1).mode(0o755).set_mode_file_type(kind);
    let mut writer = header.write(archive, u32::try_from(content.len())?);
    writer.write_all(content)?;
    writer.finish()?;
    Ok(())
}
