//! Serves raw images over NBD until its input ends, each by its file name: `cargo run --example serve SOCKET IMAGE…`.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use storage_block::{RawFile, nbd};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let socket = arguments.next().ok_or("where shall it listen?")?;
    let mut server = nbd::Server::builder();
    for image in arguments {
        let name = image.file_name().and_then(|name| name.to_str()).ok_or("an image has no name")?;
        server = server.export(name, RawFile::open(Path::new(&image), false)?.into_disk());
    }
    let server = server.bind(socket)?;
    println!("{}", server.address().uri(""));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
