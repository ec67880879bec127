//! TLS 1.3 on a connection: certificates as PEM, and a session that one thread reads while others write.

use std::io::{self, Read as _, Write as _};
use std::sync::{Arc, Mutex};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, Connection, RootCertStore, ServerConfig};

use super::channel::Wire;
use crate::store::lock;
use crate::{Error, ErrorKind, Result};

/// A server's certificate, and whose certificates its clients need. Cheap to clone.
///
/// ```
/// use storage_block::nbd::TlsServer;
///
/// # let dir = tempfile::tempdir()?;
/// # let key = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
/// # std::fs::write(dir.path().join("server-cert.pem"), key.cert.pem())?;
/// # std::fs::write(dir.path().join("server-key.pem"), key.signing_key.serialize_pem())?;
/// # std::fs::write(dir.path().join("ca-cert.pem"), key.cert.pem())?;
/// let read = |name| std::fs::read(dir.path().join(name));
/// let (certificate, key) = (read("server-cert.pem")?, read("server-key.pem")?);
/// let anybody = TlsServer::from_pem(&certificate, &key, None)?;
/// let known = TlsServer::from_pem(&certificate, &key, Some(&read("ca-cert.pem")?))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct TlsServer(Arc<ServerConfig>);

impl TlsServer {
    /// From the certificate, followed by those that vouch for it, and its private key. With `client_ca` only
    /// clients with a certificate from there are served; without, anybody is.
    ///
    /// # Errors
    ///
    /// [`Untrusted`](ErrorKind::Untrusted) if they are no PEM or do not belong together.
    pub fn from_pem(certificates: &[u8], key: &[u8], client_ca: Option<&[u8]>) -> Result<Self> {
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(untrusted)?;
        let config = match client_ca {
            None => config.with_no_client_auth(),
            Some(ca) => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider()).build();
                config.with_client_cert_verifier(verifier.map_err(untrusted)?)
            }
        };
        let mut config =
            config.with_single_cert(chain(certificates)?, private_key(key)?).map_err(untrusted)?;
        // Nobody comes back often enough to resume.
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(config)))
    }

    pub(super) fn accept(&self) -> io::Result<Connection> {
        let connection = rustls::ServerConnection::new(Arc::clone(&self.0)).map_err(broken)?;
        Ok(connection.into())
    }
}

/// Whom a client trusts, whom it wants to speak to, and who it is. Cheap to clone.
///
/// ```
/// use storage_block::nbd::{Client, TlsClient};
///
/// # let key = rcgen::generate_simple_self_signed(["disks.example".to_owned()])?;
/// # let ca = key.cert.pem().into_bytes();
/// let tls = TlsClient::from_pem(&ca, "disks.example", None)?;
/// let client = Client::builder("vol-1").tls(tls);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl TlsClient {
    /// Trusts servers with a certificate from `ca` that is for `name`, a host name or an IP address.
    /// `identity` is the certificate to show, followed by those that vouch for it, and its private key.
    ///
    /// # Errors
    ///
    /// [`Untrusted`](ErrorKind::Untrusted) if one is no PEM, if they do not belong together, or if `name` is none.
    pub fn from_pem(ca: &[u8], name: &str, identity: Option<(&[u8], &[u8])>) -> Result<Self> {
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(untrusted)?
            .with_root_certificates(roots(ca)?);
        let config = match identity {
            None => config.with_no_client_auth(),
            Some((certificates, key)) => {
                config.with_client_auth_cert(chain(certificates)?, private_key(key)?).map_err(untrusted)?
            }
        };
        let name = ServerName::try_from(name.to_owned()).map_err(untrusted)?;
        Ok(Self { config: Arc::new(config), name })
    }

    pub(super) fn connect(&self) -> io::Result<Connection> {
        let connection = rustls::ClientConnection::new(Arc::clone(&self.config), self.name.clone());
        Ok(connection.map_err(broken)?.into())
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(ca: &[u8]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in chain(ca)? {
        roots.add(certificate).map_err(untrusted)?;
    }
    Ok(roots)
}

fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(untrusted)?;
    if chain.is_empty() {
        return Err(Error::new(ErrorKind::Untrusted, "there is no certificate in the PEM"));
    }
    Ok(chain)
}

fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem).map_err(untrusted)
}

fn untrusted(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::with_source(ErrorKind::Untrusted, "the certificates are of no use", error)
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Whether an error comes of certificates, ours or the other side's.
pub(super) fn is_about_trust(error: &io::Error) -> bool {
    let source = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    source.is_some_and(|source| {
        use rustls::AlertDescription as Alert;
        match source {
            rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => true,
            rustls::Error::AlertReceived(alert) => matches!(
                alert,
                Alert::BadCertificate
                    | Alert::UnsupportedCertificate
                    | Alert::CertificateRevoked
                    | Alert::CertificateExpired
                    | Alert::CertificateUnknown
                    | Alert::UnknownCA
                    | Alert::CertificateRequired
                    | Alert::AccessDenied
                    | Alert::HandshakeFailure
            ),
            _ => false,
        }
    })
}

/// What goes over the wire at once, at most.
const CIPHERTEXT: usize = 256 << 10;

/// An encrypted stream. Nobody waits for the wire with `state` locked, so that one direction never holds up the other.
#[derive(Debug)]
pub(super) struct Session {
    state: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    /// What is encrypted and not sent; whoever holds it sends.
    outgoing: Mutex<Vec<u8>>,
}

/// Received, and not decrypted yet.
#[derive(Debug)]
struct Incoming {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Session {
    pub(super) fn start(mut connection: Connection, wire: &Wire) -> io::Result<Self> {
        while connection.is_handshaking() {
            connection.complete_io(&mut Stream(wire))?;
        }
        while connection.wants_write() {
            connection.write_tls(&mut Stream(wire))?;
        }
        let incoming = Incoming { bytes: vec![0; CIPHERTEXT].into(), start: 0, end: 0 };
        Ok(Self { state: connection.into(), incoming: incoming.into(), outgoing: Mutex::default() })
    }

    pub(super) fn receive(&self, wire: &Wire, buf: &mut [u8]) -> io::Result<usize> {
        let mut incoming = lock(&self.incoming);
        loop {
            let mut state = lock(&self.state);
            match state.reader().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            if incoming.start < incoming.end {
                incoming.start += state.read_tls(&mut &incoming.bytes[incoming.start..incoming.end])?;
                let processed = state.process_new_packets().map(drop).map_err(broken);
                drop(state);
                self.send_own(wire);
                processed?;
                continue;
            }
            drop(state);
            let received = wire.receive(&mut incoming.bytes)?;
            if received == 0 {
                return Ok(0);
            }
            (incoming.start, incoming.end) = (0, received);
        }
    }

    pub(super) fn send(&self, wire: &Wire, head: &[u8], data: &[u8]) -> io::Result<()> {
        let mut outgoing = lock(&self.outgoing);
        for mut part in [head, data] {
            while !part.is_empty() {
                let mut state = lock(&self.state);
                while !part.is_empty() && outgoing.len() < CIPHERTEXT {
                    let taken = state.writer().write(part)?;
                    part = &part[taken..];
                    while state.wants_write() {
                        state.write_tls(&mut *outgoing)?;
                    }
                }
                drop(state);
                if !part.is_empty() {
                    wire.send(&outgoing, &[])?;
                    outgoing.clear();
                }
            }
        }
        wire.send(&outgoing, &[])?;
        outgoing.clear();
        Ok(())
    }

    /// Sends what TLS has to say for itself, unless somebody is sending, whose next message then takes it along:
    /// who receives must not wait for the other side to do so.
    fn send_own(&self, wire: &Wire) {
        let Ok(mut outgoing) = self.outgoing.try_lock() else { return };
        let mut state = lock(&self.state);
        while state.wants_write() && state.write_tls(&mut *outgoing).is_ok() {}
        drop(state);
        if !outgoing.is_empty() {
            // If it fails, so does what follows.
            let _ = wire.send(&outgoing, &[]);
            outgoing.clear();
        }
    }
}

/// The wire during the handshake, when there is one thread.
struct Stream<'w>(&'w Wire);

impl io::Read for Stream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.receive(buf)
    }
}

impl io::Write for Stream<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.send(buf, &[])?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
