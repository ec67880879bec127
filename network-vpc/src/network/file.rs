//! The file that a network is kept in.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use serde::Deserialize;

use super::{routes, vpcs};
use crate::model::{Memberships, Model};
use crate::{Error, ErrorKind, Result};

/// Its name in the network's directory.
pub(super) const NAME: &str = "network.json";

pub(super) fn parse(bytes: &[u8], file: &Path) -> Result<Model> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let unreadable = |e: serde_json::Error| {
        Error::new(ErrorKind::Corrupt, format!("{} cannot be read", file.display())).with_source(e)
    };
    let Version { format } = serde_json::from_slice(bytes).map_err(unreadable)?;
    if !(1..=Model::FORMAT).contains(&format) {
        let what = format!("{} has format {format}, of which this knows nothing", file.display());
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    let mut model: Model = serde_json::from_slice(bytes).map_err(unreadable)?;
    model.format = Model::FORMAT;
    if format < 2 {
        // There, every VPC had a way out by itself.
        let all: Vec<_> = model.vpcs.keys().copied().collect();
        all.into_iter().try_for_each(|vpc| routes::lead_out(&mut model, vpc))?;
    }
    if format < 3 {
        vpcs::mark_default_subnet(&mut model);
    }
    // Whatever names something names what is there.
    let mut members = Memberships::default();
    let mut views = model.interfaces.values().map(|interface| model.view(interface, &mut members));
    views.try_for_each(|view| view.map(drop)).map_err(|e| {
        Error::new(ErrorKind::Corrupt, format!("{} contradicts itself", file.display())).with_source(e)
    })?;
    Ok(model)
}

/// Replaces the file: it holds the one or the other, whatever happens.
pub(super) fn write(file: &Path, model: &Model) -> Result<()> {
    let failed = |e: std::io::Error| Error::host(format!("cannot write {}", file.display()), e);
    let dir = file.parent().unwrap_or(Path::new("."));
    let json = serde_json::to_vec_pretty(model).map_err(|e| failed(e.into()))?;
    let mut written = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    written.write_all(&json).map_err(failed)?;
    written.as_file().sync_all().map_err(failed)?;
    written.persist(file).map_err(|e| failed(e.error))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}
