//! A machine's disks, each served over NBD to the one connection that the child inherits.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use instance_core::machine::{DiskSpec, MachineError, MachineErrorKind};
use storage_block::nbd::Server;

use crate::child::Inherited;

/// Serves disks while it lives. Dropping it returns when no request is under way any more.
#[derive(Debug)]
pub(crate) struct Disks {
    _servers: Vec<Server>,
}

impl Disks {
    /// Serves `disks`, and connects to each.
    ///
    /// The sockets lie in a directory of their own in `runtime_dir`, which is gone again when this
    /// returns: a machine that runs leaves nothing behind, however its process ends.
    pub(crate) fn serve(
        disks: &[DiskSpec],
        runtime_dir: &Path,
    ) -> Result<(Self, Vec<Inherited>), MachineError> {
        if disks.is_empty() {
            return Ok((Self { _servers: Vec::new() }, Vec::new()));
        }
        let failed = |source| {
            let what = format!("cannot connect disks in {}", runtime_dir.display());
            MachineError::new(MachineErrorKind::Host, what).with_source(source)
        };
        let dir = tempfile::Builder::new().prefix("qemu-").tempdir_in(runtime_dir).map_err(failed)?;
        // A socket's address has room for 108 bytes; this names it however deep it lies.
        let handle = File::open(dir.path()).map_err(failed)?;
        let short = format!("/proc/self/fd/{}", handle.as_raw_fd());

        let (mut servers, mut connections) = (Vec::new(), Vec::new());
        for (index, disk) in disks.iter().enumerate() {
            let name = format!("disk{index}");
            let server = Server::bind(dir.path().join(&name), disk.disk.clone()).map_err(|source| {
                let what = format!("cannot serve disk {index} over NBD");
                MachineError::new(MachineErrorKind::Host, what).with_source(source)
            })?;
            servers.push(server);
            let connection = UnixStream::connect(Path::new(&short).join(name)).map_err(failed)?;
            connections.push(Inherited::new(connection).map_err(failed)?);
        }
        Ok((Self { _servers: servers }, connections))
    }
}
