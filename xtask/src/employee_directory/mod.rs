//! `cargo xtask employee-directory`: a server that one can connect to, on the real thing.
//!
//! A stock Debian with cloud-init is launched into a network with a key pair, a security group and user data; what
//! is checked is what its users see: the page over a forwarded port, the session of the system's `ssh`.

mod offline;
mod ssh;
mod user_data;

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ami_core::{Ami, X86_64};
use anyhow::{Context as _, Result, bail, ensure};
use instance_core::machine::Hypervisor;
use instance_core::{
    BlockDeviceMappingRequest, ImageConsistency, Instance, InstanceState, LaunchSpec, Region, RegionOptions,
};
use network_vpc::{Direction, Network, Rule};
use quick_start::BuiltImage;

use crate::guest;
use crate::prerequisites::{self, CURL, SSH};
use crate::process;
use crate::progress::step;
use crate::quickstart::{Choice, choose};
use ssh::Ssh;

/// How long a guest may take to boot, and to do what its user data says, on a processor that is emulated.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What is written last, and not flushed by whoever writes it.
const LAST_WRITTEN: &str = "/home/debian/last-written";

/// A photo, as far as anybody looks.
const PHOTO: &[u8] = b"\x89PNG\r\n\x1a\nnot much of a picture";

/// Launch a web application on a stock Debian, log in, make an image of it and launch more
#[derive(clap::Args)]
pub(crate) struct EmployeeDirectoryArgs {
    /// What runs the machines
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    hypervisor: Choice,
}

/// The command.
pub(crate) fn run(args: &EmployeeDirectoryArgs) -> Result<ExitCode> {
    prerequisites::require(&[guest::tools_of_cloud(), &[CURL, SSH]].concat())?;
    let hypervisor = choose(args.hypervisor, |line| eprintln!("  {line}"))?;
    let disk = guest::cloud(false)?;
    let dir = tempfile::tempdir().context("cannot make a directory for the region")?;
    whole(dir.path(), hypervisor, &disk)?;
    offline::run(&dir.path().join("offline"), choose(args.hypervisor, |_| {})?, &disk)?;
    println!("three servers served the directory; with another key and from another address nobody got in");
    Ok(ExitCode::SUCCESS)
}

/// An instance that is reached from the host.
struct Server {
    instance: Instance,
    web: SocketAddr,
}

fn whole(dir: &Path, hypervisor: Box<dyn Hypervisor>, disk: &BuiltImage) -> Result<()> {
    let name = "eu-west-1".parse()?;
    let network = Network::open(&dir.join("network"), &name)?;
    let mut options = RegionOptions::new().name(name).network(network.clone());
    // Without streams the guest's agent is not heard.
    let with_agent = hypervisor.capabilities().vsock;
    if with_agent {
        options = options.guest_agent(user_data::AGENT);
    }
    let region = options.open(dir.join("region"), hypervisor)?;
    let ami = step("registering the image", || Ok(disk.register(&region)?.ami().typed::<X86_64>()?))?;
    let key = network.create_key_pair("operator")?;
    let group = network.create_security_group(network.default_vpc()?, "web", "the employee directory")?.id;
    network.authorize(group, Direction::Ingress, Rule::tcp(22, "127.0.0.1/32".parse()?))?;
    let web = network.authorize(group, Direction::Ingress, Rule::tcp(80, "0.0.0.0/0".parse()?))?;

    let spec = || Ok::<_, anyhow::Error>(hardware()?.security_group(group).key_name("operator"));
    let data = BlockDeviceMappingRequest::new("/dev/xvdb").size_gib(1);
    let with_data = spec()?.block_device(data).user_data(user_data::of_first());
    let first = step("launching the first instance", || launch(&region, &network, &ami, with_data))?;
    step("waiting for its page", || wait_for_page(&first))?;
    step("adding an employee with a photo", || add_employee(dir, &first))?;
    let identity = ssh::keep_identity(dir.join("identity"), &key.private_key)?;
    let shell = step("reading its host keys off the console", || log_in(dir, &first, &identity))?;
    step("logging in and installing a package", || {
        ensure!(shell.run("cloud-id")?.trim() == "aws", "cloud-init does not take this for EC2");
        shell.run("sudo apt-get install -y --no-install-recommends hello >&2 && hello").map(drop)
    })?;
    step("trying another key, and another address", || {
        let stranger = network.create_key_pair("stranger")?;
        let with_key = shell.refusal_of(&ssh::keep_identity(dir.join("stranger"), &stranger.private_key)?)?;
        ensure!(with_key.contains("Permission denied"), "another key is refused otherwise: {with_key}");
        // Where no rule lets them in they do not come as far as that.
        let from_there = shell.refusal_from("127.0.0.2")?;
        let is_shut_out = from_there.contains("Connection closed") || from_there.contains("Connection reset");
        ensure!(is_shut_out, "another address is refused otherwise: {from_there}");
        Ok(())
    })?;
    step("stopping and starting it", || {
        first_boots(&shell, "first\n").context("at its first boot")?;
        first.instance.stop(PATIENCE)?;
        let console = first.instance.console().output();
        let in_order = String::from_utf8_lossy(&console).contains("reboot: Power down");
        ensure!(in_order, "its systemd did not heed the power button");
        Ok(first.instance.start()?)
    })?;
    step("waiting for its page", || wait_for_page(&first))?;
    let shell = log_in(dir, &first, &identity)?;
    first_boots(&shell, "first\n").context("at its second boot")?;
    let mut session = shell.echo()?;

    let image = step("making an image of it", || make_image(&first.instance, &shell, with_agent))?;
    let more = step("launching two more", || {
        let with_script = spec()?.user_data(user_data::first_boot("twin"));
        let one = launch(&region, &network, &image, with_script)?;
        Ok([one, launch(&region, &network, &image, spec()?)?])
    })?;
    // The first one has gone on while its image was made.
    for server in more.iter().chain([&first]) {
        step("waiting for its page", || wait_for_page(server))?;
        let page = curl(&[&format!("http://{}/", server.web)])?;
        ensure!(page.contains("Ada Lovelace"), "{} has other employees: {page}", server.instance.id());
    }
    step("seeing what the script of one of them did", || {
        let twin = log_in(dir, &more[0], &identity)?;
        first_boots(&twin, "first\ntwin\n")?;
        if with_agent {
            let written = twin.run(&format!("cat {LAST_WRITTEN}"))?;
            ensure!(written == "at last\n", "what was written last is {written:?} in the image");
        }
        Ok(())
    })?;
    step("closing port 80", || {
        network.revoke(group, web)?;
        for server in more.iter().chain([&first]) {
            ensure!(is_shut(server)?, "{} is still reached at port 80", server.instance.id());
        }
        for twin in &more {
            log_in(dir, twin, &identity)?
                .run("systemctl is-active --quiet nginx")
                .context("it has ended instead")?;
        }
        session.check("still here").context("the open session did not live on")
    })?;
    drop(session);
    step("terminating everything", || {
        more.iter().chain([&first]).try_for_each(|server| Ok(server.instance.terminate()?))
    })?;
    ensure!(network.interfaces().is_empty(), "interfaces are left: {:?}", network.interfaces());
    Ok(())
}

/// Makes an image of an instance that goes on, whose guest has something in its page cache alone, if its agent can be asked to
/// write that.
fn make_image(instance: &Instance, shell: &Ssh, with_agent: bool) -> Result<Ami<X86_64>> {
    // What has been installed is written before, so that no more is left than is soon done by an emulated processor.
    let is_there = "systemctl is-active --quiet qemu-guest-agent || systemctl status qemu-guest-agent >&2";
    shell.run(&format!("{{ {is_there}; }} && sync")).context("its agent is not there")?;
    shell.run(&format!("echo at last > {LAST_WRITTEN}"))?;
    let created = instance.create_image("employee-directory")?;
    if with_agent && created.consistency != ImageConsistency::FileSystemConsistent {
        let said =
            shell.run("sudo journalctl -b --no-pager -u qemu-guest-agent; lsmod | grep vsock; true")?;
        bail!(
            "its agent did not have its file systems stand still, and the image is {}:\n{said}",
            created.consistency
        );
    }
    Ok(created.ami.typed::<X86_64>()?)
}

/// EC2's smallest with memory enough for Debian's package manager.
fn hardware() -> Result<LaunchSpec> {
    Ok(LaunchSpec::new("t3.micro".parse()?))
}

fn launch(
    region: &Region<Box<dyn Hypervisor>>,
    network: &Network,
    ami: &Ami<X86_64>,
    spec: LaunchSpec,
) -> Result<Server> {
    let instance = region.launch(ami, spec)?;
    let place = instance.describe().network.context("the instance has no place in the network")?;
    let free = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let web = network.forward(place.interface_id, 80, free)?;
    eprintln!("    {} is {}: http://{web}/", instance.id(), place.private_ip);
    Ok(Server { instance, web })
}

/// A way into a server, once it has shown its host keys.
fn log_in(dir: &Path, server: &Server, identity: &Path) -> Result<Ssh> {
    let deadline = Instant::now() + PATIENCE;
    let mut console = server.instance.console().reader();
    loop {
        match Ssh::new(dir, &server.instance, identity) {
            Err(e) if is_unknown(&e) => console.read(deadline).map(drop)?,
            known => return known,
        }
    }
}

/// Whether an instance has not shown its host keys yet.
fn is_unknown(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<instance_core::Error>();
    error.is_some_and(|e| e.kind() == instance_core::ErrorKind::HostKeysUnknown)
}

/// That the scripts that an instance was given have left these lines, when it has done all that it was given to do.
fn first_boots(shell: &Ssh, expect: &str) -> Result<()> {
    let lines = shell.run(&format!("cloud-init status --wait >&2; cat {}", user_data::FIRST_BOOTS))?;
    ensure!(lines == expect, "its scripts have left {lines:?}, not {expect:?}");
    Ok(())
}

fn wait_for_page(server: &Server) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !serves(server) {
        let state = server.instance.state();
        if state != InstanceState::Running || Instant::now() > deadline {
            let console = server.instance.console().output();
            bail!("it serves no page and is {state}:\n{}", String::from_utf8_lossy(&console));
        }
        // Of a page nobody tells that it is there.
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(())
}

/// Whether the page is there.
fn serves(server: &Server) -> bool {
    let url = format!("http://{}/", server.web);
    TcpStream::connect_timeout(&server.web, Duration::from_secs(1)).is_ok()
        && curl(&[&url]).is_ok_and(|page| page.contains("<h1>Employee directory</h1>"))
}

/// Whether whoever connects to the page's port is turned away without a word.
fn is_shut(server: &Server) -> Result<bool> {
    let mut client = TcpStream::connect(server.web)?;
    client.set_read_timeout(Some(Duration::from_secs(20)))?;
    match client.read(&mut [0]) {
        Ok(len) => Ok(len == 0),
        Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(true),
        // A server waits for what is asked of it.
        Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn add_employee(dir: &Path, server: &Server) -> Result<()> {
    let photo = dir.join("photo.png");
    std::fs::write(&photo, PHOTO)?;
    let url = format!("http://{}/employees", server.web);
    let form = format!("photo=@{}", photo.display());
    curl(&["-F", "name=Ada Lovelace", "-F", "title=Programmer", "-F", &form, &url])?;
    let page = curl(&[&format!("{url}/1")])?;
    ensure!(page.contains("Programmer"), "the employee is not shown: {page}");
    let copy = dir.join("copy.png");
    curl(&["-o", &copy.display().to_string(), &format!("{url}/1/photo")])?;
    ensure!(std::fs::read(copy)? == PHOTO, "the photo comes back differently");
    Ok(())
}

fn curl(arguments: &[&str]) -> Result<String> {
    process::output(process::command("curl").args(["-sS", "--fail", "--max-time", "20"]).args(arguments))
}
