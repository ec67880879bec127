//! Takes an image of another program's into a region, and out again in a third format: raw, qcow2 and VMDK.
//!
//! ```console
//! $ cargo run --package ami-examples --example formats -- target/guest/amd64/disk.raw
//! ```

use std::error::Error;
use std::ops::ControlFlow;

use ami_core::{Ami, X86_64};
use image_formats::{Compression, ExportOptions, Format, Progress, export, open};
use instance_core::testing::FakeHypervisor;
use instance_core::{ImageSource, Region};

fn main() -> Result<(), Box<dyn Error>> {
    let raw = std::env::args().nth(1).ok_or("usage: formats IMAGE")?;
    let dir = tempfile::tempdir()?;
    // No machine is made here; any hypervisor would do.
    let region = Region::open(dir.path().join("region"), FakeHypervisor::new())?;

    // As somebody else would bring it.
    let brought = dir.path().join("brought.vmdk");
    let image = open(&raw, Format::probe(&raw)?)?;
    export(&image, &brought, &ExportOptions::new(Format::Vmdk), &mut show)?;

    let format = Format::probe(&brought)?;
    let disk = open(&brought, format)?;
    let ami = region.register_image(Ami::<X86_64>::builder("brought"), ImageSource::new(&disk))?;
    println!("{} was a {format:?} image", ami.id());

    let taken = dir.path().join("taken.qcow2");
    let root = region.image_disk(ami.id(), "/dev/xvda")?;
    let packed = ExportOptions::new(Format::Qcow2).compression(Compression::Zlib);
    export(&root, &taken, &packed, &mut show)?;
    let again = open(&taken, Format::Qcow2)?;

    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..image.size()).step_by(one.len()) {
        let len = one.len().min((image.size() - at) as usize);
        image.read_at(&mut one[..len], at)?;
        again.read_at(&mut other[..len], at)?;
        if one[..len] != other[..len] {
            return Err(format!("the images differ from byte {at} on").into());
        }
    }
    let bytes = taken.metadata()?.len();
    println!("{} bytes of qcow2 hold the same {} bytes", bytes, image.size());
    Ok(())
}

/// Where it would be shown how far an export is.
fn show(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
