//! NBD over TLS: our two sides against each other and against the tools of others.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use storage_block::{Disk, ErrorKind, MemoryDisk, Store, Volume, nbd, testing};

mod tools;
use tools::{have, image, outcome, run};

/// The certificates of a server and a client from an authority, and those of another that nobody knows; in
/// directories as the tools want them.
struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for owner in ["ours", "theirs"] {
            let dir = dir.path().join(owner);
            std::fs::create_dir(&dir).unwrap();
            let write = |name: &str, pem: String| std::fs::write(dir.join(name), pem).unwrap();
            let mut params = CertificateParams::default();
            params.distinguished_name.push(rcgen::DnType::CommonName, format!("the authority of {owner}"));
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            write("ca-cert.pem", authority.pem());
            for (name, purpose) in [
                ("server", ExtendedKeyUsagePurpose::ServerAuth),
                ("client", ExtendedKeyUsagePurpose::ClientAuth),
            ] {
                let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
                let mut params = CertificateParams::new(names).unwrap();
                params.distinguished_name.push(rcgen::DnType::CommonName, name);
                params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
                params.extended_key_usages = vec![purpose];
                let key = KeyPair::generate().unwrap();
                write(&format!("{name}-cert.pem"), params.signed_by(&key, &authority).unwrap().pem());
                write(&format!("{name}-key.pem"), key.serialize_pem());
            }
        }
        // Who knows the authority and has no certificate.
        std::fs::create_dir(dir.path().join("nameless")).unwrap();
        std::fs::copy(dir.path().join("ours/ca-cert.pem"), dir.path().join("nameless/ca-cert.pem")).unwrap();
        Self { dir }
    }

    fn dir(&self, owner: &str) -> std::path::PathBuf {
        self.dir.path().join(owner)
    }

    fn read(&self, owner: &str, name: &str) -> Vec<u8> {
        std::fs::read(self.dir(owner).join(name)).unwrap()
    }

    fn server(&self, client_ca: bool) -> nbd::TlsServer {
        let ca = self.read("ours", "ca-cert.pem");
        let ca = client_ca.then_some(&ca[..]);
        nbd::TlsServer::from_pem(
            &self.read("ours", "server-cert.pem"),
            &self.read("ours", "server-key.pem"),
            ca,
        )
        .unwrap()
    }

    /// A client that trusts the authority of `owner`, as the holder of a certificate of `identity`.
    fn client(&self, owner: &str, identity: Option<&str>) -> nbd::TlsClient {
        let identity =
            identity.map(|owner| (self.read(owner, "client-cert.pem"), self.read(owner, "client-key.pem")));
        let identity = identity.as_ref().map(|(certificate, key)| (&certificate[..], &key[..]));
        nbd::TlsClient::from_pem(&self.read(owner, "ca-cert.pem"), "localhost", identity).unwrap()
    }
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn port(server: &nbd::Server) -> SocketAddr {
    match server.address() {
        nbd::Address::Tcp(port) => *port,
        other => panic!("{other} is no port"),
    }
}

#[test]
fn conforms_over_tls() {
    let certificates = Certificates::new();
    let servers = std::cell::RefCell::new(Vec::new());
    testing::conformance(|size| {
        let disk = MemoryDisk::new(size).unwrap().into_disk();
        let server =
            nbd::Server::builder().export("x", disk).tls(certificates.server(true)).bind(loopback()).unwrap();
        let client = nbd::Client::builder("x").tls(certificates.client("ours", Some("ours")));
        let disk = client.connect(port(&server)).unwrap().into_disk();
        servers.borrow_mut().push(server);
        disk
    });
}

#[test]
fn who_is_not_known_is_not_served() {
    let certificates = Certificates::new();
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    let server = |client_ca: bool| {
        let tls = certificates.server(client_ca);
        nbd::Server::builder().export("", disk.clone()).tls(tls).bind(loopback()).unwrap()
    };
    let plain = nbd::Server::builder().export("", disk.clone()).bind(loopback()).unwrap();
    let (anybody, known) = (server(false), server(true));
    for (what, server, tls, expected) in [
        ("anybody", &anybody, Some(certificates.client("ours", None)), None),
        ("a known client", &known, Some(certificates.client("ours", Some("ours"))), None),
        (
            "an unknown server",
            &anybody,
            Some(certificates.client("theirs", None)),
            Some(ErrorKind::Untrusted),
        ),
        ("no certificate", &known, Some(certificates.client("ours", None)), Some(ErrorKind::Untrusted)),
        (
            "a strange one",
            &known,
            Some(certificates.client("ours", Some("theirs"))),
            Some(ErrorKind::Untrusted),
        ),
        ("TLS is wanted by the server", &known, None, Some(ErrorKind::Untrusted)),
        (
            "TLS is wanted by the client",
            &plain,
            Some(certificates.client("ours", None)),
            Some(ErrorKind::Untrusted),
        ),
    ] {
        let mut client = nbd::Client::builder("");
        if let Some(tls) = tls {
            client = client.tls(tls);
        }
        let found = client.connect(port(server)).map(|client| client.into_disk().read_at(&mut [0; 9], 5));
        let found = found.and_then(|read| read).err().map(|error| error.kind());
        assert_eq!(found, expected, "{what}");
    }
    // A certificate for another name.
    let ca = certificates.read("ours", "ca-cert.pem");
    let tls = nbd::TlsClient::from_pem(&ca, "example.org", None).unwrap();
    let found = nbd::Client::builder("").tls(tls).connect(port(&anybody));
    assert_eq!(found.err().map(|error| error.kind()), Some(ErrorKind::Untrusted));
}

#[test]
fn certificates_that_are_none_are_errors() {
    let certificates = Certificates::new();
    let (certificate, key) =
        (certificates.read("ours", "server-cert.pem"), certificates.read("ours", "server-key.pem"));
    let other = certificates.read("theirs", "server-key.pem");
    for (certificate, key, ca) in [
        (&b""[..], &key[..], None),
        (&certificate, b"", None),
        (&certificate, &other, None),
        (&certificate, &key, Some(&b"no PEM"[..])),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", &key, None),
    ] {
        let found = nbd::TlsServer::from_pem(certificate, key, ca).err().map(|error| error.kind());
        assert_eq!(found, Some(ErrorKind::Untrusted));
    }
    let found = nbd::TlsClient::from_pem(&certificate, "no name at all", None);
    assert_eq!(found.err().map(|error| error.kind()), Some(ErrorKind::Untrusted));
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

/// Nothing but TLS is talked about before it, and nothing that was sent before it counts.
#[test]
fn nothing_is_said_before_tls() {
    let certificates = Certificates::new();
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    let server = nbd::Server::builder().export("", disk).tls(certificates.server(false));
    let server = server.handshake_timeout(Duration::from_millis(500)).bind(loopback()).unwrap();
    let connect = || {
        let mut stream = TcpStream::connect(port(&server)).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream
    };
    for (number, data, kind) in [
        (3, &b""[..], 0x8000_0005u32),
        (6, &[0; 6], 0x8000_0005),
        (7, &[0; 6], 0x8000_0005),
        (8, b"", 0x8000_0005),
        (9, b"", 0x8000_0005),
        (99, b"", 0x8000_0005),
        (5, b"x", 0x8000_0003),
        (2, b"", 1),
    ] {
        let mut stream = connect();
        stream.write_all(&option(number, data)).unwrap();
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(head[12..16], kind.to_be_bytes(), "option {number}");
    }
    // The old way in, and what is slipped in behind the wish for TLS.
    for (bytes, answered) in [(option(1, b""), 0), ([option(5, b""), option(3, b"")].concat(), 20)] {
        let mut stream = connect();
        stream.write_all(&bytes).unwrap();
        stream.read_exact(&mut vec![0; answered]).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.windows(4).any(|bytes| bytes == [0, 0, 0, 2]), "an export was listed: {rest:x?}");
    }
    // One that begins with TLS and goes silent is cut off.
    let mut stream = connect();
    stream.write_all(&option(5, b"")).unwrap();
    stream.write_all(&[0x16, 3, 1, 1, 0]).unwrap();
    let _ = stream.read_to_end(&mut Vec::new());
}

fn volume(dir: &Path, bytes: &[u8]) -> (Volume, Disk) {
    let store = Store::open(dir.join("store")).unwrap();
    let image = MemoryDisk::from_vec(bytes.to_vec()).unwrap().into_disk();
    let (snapshot, _) = store.import(&image, &mut |_| ()).unwrap();
    let volume = Volume::create(&dir.join("volume"), Some(&snapshot), snapshot.size()).unwrap();
    (volume, snapshot.disk())
}

#[test]
fn libnbd_tools_over_tls() {
    if !have(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    let certificates = Certificates::new();
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(16 << 20);
    let (volume, snapshot) = volume(dir.path(), &bytes);
    let server = nbd::Server::builder().export("volume", volume.disk()).export("snapshot", snapshot);
    let server = server.tls(certificates.server(true)).bind(loopback()).unwrap();
    let uri = |export: &str, owner: &str| {
        let port = port(&server).port();
        format!("nbds://localhost:{port}/{export}?tls-certificates={}", certificates.dir(owner).display())
    };
    let info = run("nbdinfo", &[&uri("snapshot", "ours")]);
    assert!(info.contains("with TLS") && info.contains("is_read_only: true"), "{info}");
    assert!(run("nbdinfo", &["--map", &uri("snapshot", "ours")]).contains("hole,zero"));
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&uri("snapshot", "ours"), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == bytes);
    let other: Vec<u8> = bytes.iter().map(|byte| byte ^ 0x55).collect();
    std::fs::write(&copy, &other).unwrap();
    run("nbdcopy", &["--flush", copy.to_str().unwrap(), &uri("volume", "ours")]);
    let mut found = vec![0; other.len()];
    volume.disk().read_at(&mut found, 0).unwrap();
    assert!(found == other);
    for owner in ["nameless", "theirs"] {
        let (success, said) = outcome("nbdinfo", &[&uri("snapshot", owner)]);
        assert!(!success, "{owner}: {said}");
    }
    let plain = format!("nbd://localhost:{}/snapshot", port(&server).port());
    assert!(!outcome("nbdinfo", &[&plain]).0);
}

#[test]
fn qemu_img_over_tls() {
    if !have(&["qemu-img"]) {
        return;
    }
    let certificates = Certificates::new();
    let dir = tempfile::tempdir().unwrap();
    let bytes = image(8 << 20);
    let (volume, snapshot) = volume(dir.path(), &bytes);
    let server = nbd::Server::builder().export("volume", volume.disk()).export("snapshot", snapshot);
    let server = server.tls(certificates.server(true)).bind(loopback()).unwrap();
    let object = |owner: &str| {
        let dir = certificates.dir(owner);
        format!("tls-creds-x509,id=t,endpoint=client,verify-peer=on,dir={}", dir.display())
    };
    let image = |export: &str| {
        let port = port(&server).port();
        format!(
            "driver=nbd,server.type=inet,server.host=localhost,server.port={port},export={export},tls-creds=t"
        )
    };
    let raw = dir.path().join("raw");
    let raw = raw.to_str().unwrap();
    let ours = object("ours");
    run("qemu-img", &["convert", "--object", &ours, "--image-opts", &image("snapshot"), "-O", "raw", raw]);
    assert!(std::fs::read(raw).unwrap() == bytes);
    let other: Vec<u8> = bytes.iter().map(|byte| byte ^ 0x55).collect();
    std::fs::write(raw, &other).unwrap();
    let target = ["--target-image-opts", "-n", "--image-opts"];
    let source = format!("driver=raw,file.filename={raw}");
    run("qemu-img", &[&["convert", "--object", &ours], &target[..], &[&source, &image("volume")]].concat());
    let mut found = vec![0; other.len()];
    volume.disk().read_at(&mut found, 0).unwrap();
    assert!(found == other);
    let theirs = object("theirs");
    assert!(!outcome("qemu-img", &["info", "--object", &theirs, "--image-opts", &image("snapshot")]).0);
}

/// Other hosts are let in once they can be told apart.
#[test]
fn with_tls_any_address_is_served() {
    let certificates = Certificates::new();
    let disk = MemoryDisk::new(1 << 20).unwrap().into_disk();
    let everywhere = SocketAddr::from(([0, 0, 0, 0], 0));
    let refused = nbd::Server::builder().export("", disk.clone()).bind(everywhere);
    assert_eq!(refused.err().map(|error| error.kind()), Some(ErrorKind::Untrusted));
    let server =
        nbd::Server::builder().export("", disk).tls(certificates.server(true)).bind(everywhere).unwrap();
    let client = nbd::Client::builder("").tls(certificates.client("ours", Some("ours")));
    client.connect(SocketAddr::from(([127, 0, 0, 1], port(&server).port()))).unwrap();
}
