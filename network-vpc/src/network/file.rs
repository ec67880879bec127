//! The file that a network is kept in.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::Deserialize;

use super::{routes, vpcs};
use crate::model::{Memberships, Model};
use crate::{Error, ErrorKind, Result};

/// Its name in the network's directory.
pub(super) const NAME: &str = "network.json";

/// That of the one that is to take its place.
const NEW: &str = "network.json.new";

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
    let json = serde_json::to_vec_pretty(model).map_err(|e| failed(e.into()))?;
    // The directory has one owner, who finds here what was left by one that was killed.
    let new = file.with_file_name(NEW);
    let replaced = write_new(&new, &json).and_then(|()| fs::rename(&new, file));
    replaced.map_err(|e| {
        // It may fail for want of room.
        let _ = fs::remove_file(&new);
        failed(e)
    })?;
    let dir = file.parent().unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}

fn write_new(new: &Path, json: &[u8]) -> io::Result<()> {
    let mut new = File::options().create(true).truncate(true).write(true).mode(0o600).open(new)?;
    new.write_all(json)?;
    new.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_written_to_its_end_is_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(NAME);
        let model = vpcs::first_model(&"us-east-1".parse().unwrap()).unwrap();
        fs::write(dir.path().join(NEW), vec![b'x'; 100_000]).unwrap();
        write(&file, &model).unwrap();
        let there: Vec<_> = dir.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(there, [NAME]);
        assert!(parse(&fs::read(&file).unwrap(), &file).unwrap().vpcs == model.vpcs);
        // What fails leaves nothing either.
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert!(write(&file, &model).is_err());
        assert_eq!(dir.path().read_dir().unwrap().count(), 1);
    }
}
