//! The smallest recipe, built for real, as far as this host can: found again, cancelled, registered.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ami_core::Architecture::{X86, X86_64};
use ami_core::{Category, DescribeImages, Filter, OwnerAlias};
use instance_core::testing::FakeHypervisor;
use instance_core::{LaunchSpec, Region};
use quick_start::{Build, BuiltImage, ErrorKind, PUBLISHER, Progress, recipe};
use tempfile::TempDir;

/// Packages that the workspace has fetched, so that tests do not fetch them again.
fn packages() -> PathBuf {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/guest");
    let guests = std::env::var_os("AMI_GUEST_DIR").map_or_else(|| PathBuf::from(workspace), PathBuf::from);
    guests.join("packages")
}

fn build(dir: &Path) -> Build {
    Build::new(recipe("minimal").unwrap(), dir).packages(packages())
}

/// The image, built once for all tests, where this host can.
fn built() -> Option<&'static BuiltImage> {
    static BUILT: OnceLock<Option<(TempDir, BuiltImage)>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        or_skipped(build(&dir.path().join("image")).run()).map(|built| (dir, built))
    });
    built.as_ref().map(|(_, built)| built)
}

fn or_skipped(built: quick_start::Result<BuiltImage>) -> Option<BuiltImage> {
    match built {
        Ok(built) => Some(built),
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text += &format!(": {cause}");
                source = cause.source();
            }
            assert!(std::env::var_os("CI").is_none(), "nothing may be skipped under CI, but: {text}");
            eprintln!("SKIPPED: this host cannot build the image: {text}");
            None
        }
    }
}

#[test]
fn it_is_built_and_found_again() {
    let Some(built) = built() else { return };
    assert_eq!(built.disk().metadata().unwrap().len(), built.recipe().disk_size());
    assert_eq!(*built.operating_system(), built.recipe().operating_system().unwrap());
    let named = |start: &str| built.packages().iter().any(|package| package.name.starts_with(start));
    assert!(named("linux-image-") && named("busybox-static"), "{:?}", built.packages());
    let disk = storage_block::RawFile::open(built.disk(), true).unwrap().into_disk();
    let entry = boot_image::BootEntry::find(&disk).unwrap();
    assert!(entry.command_line.contains("console=ttyS0"), "{}", entry.command_line);

    // Again: nothing is done, which nobody is told of.
    let inode = |built: &BuiltImage| built.disk().metadata().unwrap().ino();
    let mut told = 0;
    let again = build(built.dir()).run_with(&mut |_| told += 1).unwrap();
    assert_eq!((told, &again, inode(&again)), (0, built, inode(built)));
    // Nor if what is current is asked for, and that is the same.
    let current = build(built.dir()).update(true).run().unwrap();
    assert_eq!((&current, inode(&current)), (built, inode(built)));
}

/// The way to it from where this process is.
fn relative(path: &Path) -> PathBuf {
    let here = std::env::current_dir().unwrap();
    let up: PathBuf = here.ancestors().skip(1).map(|_| "..").collect();
    up.join(path.strip_prefix("/").unwrap())
}

/// Those of Debian's, whose package lists are always a build's own, in directories that are named as in examples.
#[test]
fn debian_is_built_in_relative_directories() {
    let dir = tempfile::tempdir().unwrap();
    for (name, architecture) in [("debian-13-minimal", X86_64), ("debian-12-minimal", X86)] {
        let into = relative(&dir.path().join(name));
        assert!(into.is_relative());
        let build = Build::new(recipe(name).unwrap(), into).architecture(architecture);
        let Some(built) = or_skipped(build.packages(relative(&packages())).run()) else { return };
        assert_eq!((built.recipe().name(), built.architecture()), (name, architecture));
        assert!(built.dir().is_absolute(), "{}", built.dir().display());
        let disk = storage_block::RawFile::open(built.disk(), true).unwrap().into_disk();
        let entry = boot_image::BootEntry::find(&disk).unwrap();
        assert!(entry.command_line.contains("console=ttyS0"), "{name}: {}", entry.command_line);
        // The lists are where packages are kept, and not below apt's own.
        let version = &built.operating_system().version()[..2];
        let suite = if version == "12" { "apt-bookworm-i386" } else { "apt-trixie-amd64" };
        assert!(entries(&packages().join(suite).join("lists")).len() > 1, "{name} has no lists");
    }
}

#[test]
fn packages_cannot_be_kept_where_is_built() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let build = Build::new(recipe("minimal").unwrap(), &image).packages(dir.path().join("./image/"));
    if recipe("minimal").unwrap().check_host().is_ok() {
        assert_eq!(build.run().unwrap_err().kind(), ErrorKind::InvalidParameter);
        assert!(!image.exists());
    }
}

#[test]
fn what_was_built_otherwise_is_not_taken_for_it() {
    let Some(built) = built() else { return };
    let dir = tempfile::tempdir().unwrap();
    for name in ["vmlinuz", "initrd.img", "disk.raw", "build.json"] {
        std::os::unix::fs::symlink(built.dir().join(name), dir.path().join(name)).unwrap();
    }
    assert_eq!(build(dir.path()).find().map(|found| found.digest()), Some(built.digest()));
    let other = Build::new(recipe("debian-12-minimal").unwrap(), dir.path());
    assert_eq!(other.find(), None, "another recipe");

    let text = fs::read_to_string(built.dir().join("build.json")).unwrap();
    let made_by = text.find("sha256:").unwrap() + "sha256:".len();
    let digit = if text.as_bytes()[made_by] == b'0' { "1" } else { "0" };
    let mut changed = text.clone();
    changed.replace_range(made_by..=made_by, digit);
    for (what, text) in
        [("a recipe that has changed", &*changed), ("no text", ""), ("a torn text", &text[..40])]
    {
        fs::remove_file(dir.path().join("build.json")).unwrap();
        fs::write(dir.path().join("build.json"), text).unwrap();
        assert_eq!(build(dir.path()).find(), None, "{what}");
    }
    fs::write(dir.path().join("build.json"), &text).unwrap();
    assert!(build(dir.path()).find().is_some());
    fs::remove_file(dir.path().join("vmlinuz")).unwrap();
    fs::write(dir.path().join("vmlinuz"), "").unwrap();
    assert_eq!(build(dir.path()).find(), None, "an empty kernel");
    fs::write(dir.path().join("vmlinuz"), "a kernel").unwrap();
    assert!(build(dir.path()).find().is_some());
    fs::remove_file(dir.path().join("disk.raw")).unwrap();
    assert_eq!(build(dir.path()).find(), None, "a disk that is gone");
}

/// The packages that there are, in a directory that other tests neither work in nor have one wait for.
fn own_packages(dir: &Path) -> PathBuf {
    let own = dir.join("packages");
    fs::create_dir(&own).unwrap();
    for name in entries(&packages()).iter().filter(|name| !name.starts_with(".")) {
        std::os::unix::fs::symlink(packages().join(name), own.join(name)).unwrap();
    }
    own
}

/// Cancelled at its first report, then at its second, until it is too late.
#[test]
fn what_is_cancelled_leaves_nothing() {
    if built().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, packages) = (dir.path().join("image"), own_packages(dir.path()));
    let before = entries(&packages);
    for at in 1.. {
        let mut reports = Vec::new();
        let done = build(&image).packages(&packages).run_with(&mut |progress: Progress| {
            reports.push(progress.done);
            if reports.len() == at {
                progress.cancel();
            }
        });
        assert!(reports.is_sorted(), "{reports:?}");
        match done {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Cancelled, "report {at}: {error}");
                assert_eq!(reports.len(), at, "it goes on after report {at}");
                assert!(!image.exists(), "report {at}: {:?}", entries(&image));
            }
            Ok(built) => {
                // One has fewer than the one before where that had more to do.
                assert!(at > 3 && reports.len() <= at && reports.last() == Some(&100), "{reports:?}");
                assert!(built.disk().is_file());
                break;
            }
        }
    }
    assert_eq!(entries(&packages), before, "something is left of a download");
    assert_eq!(entries(&image), ["build.json", "disk.raw", "initrd.img", "vmlinuz"]);
}

fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names
}

#[test]
fn it_is_registered_as_a_quick_start_ami() {
    let Some(built) = built() else { return };
    let dir = tempfile::tempdir().unwrap();
    let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
    let ended = built.register_with(&region, &mut |progress| progress.cancel());
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(region.images().unwrap().is_empty());

    let image = built.register(&region).unwrap();
    assert_eq!(image.owner_alias(), Some(OwnerAlias::Amazon));
    assert_eq!(image.ami().owner().to_string(), PUBLISHER);
    assert_eq!(image.category(region.account()), Some(Category::QuickStart));
    assert_eq!((image.ami().name(), image.description()), (&*built.ami_name(), built.recipe().description()));
    let search = DescribeImages::new()
        .owner("amazon".parse().unwrap())
        .filter(Filter::new("name", ["minimal-*"]).unwrap());
    assert_eq!(region.describe_images(&search).unwrap().items, std::slice::from_ref(&image));
    // What is there is not registered twice.
    assert_eq!(built.register(&region).unwrap(), image);
    assert_eq!(region.images().unwrap().len(), 1);

    let server = region.launch(image.ami(), LaunchSpec::new("t2.nano".parse().unwrap())).unwrap();
    assert_eq!(server.describe().owner, *region.account());
}

/// A crash between the two steps of registering leaves an image that only its publisher sees.
#[test]
fn what_a_crash_left_half_registered_is_finished() {
    use ami_core::{AnyAmi, Query};
    use instance_core::ImageSource;

    let Some(built) = built() else { return };
    let dir = tempfile::tempdir().unwrap();
    let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
    let disk = storage_block::RawFile::open(built.disk(), true).unwrap().into_disk();
    let builder = AnyAmi::builder_for(built.architecture(), built.ami_name());
    let publisher = region.as_account(PUBLISHER.parse().unwrap());
    let half = publisher.register_image(builder, ImageSource::new(&disk)).unwrap();
    assert!(region.images().unwrap().is_empty());

    let whole = built.register(&region).unwrap();
    assert_eq!((whole.id(), whole.category(region.account())), (half.id(), Some(Category::QuickStart)));
    assert_eq!(ami_core::Catalog::list(&region.catalog(), &Query::all()).unwrap(), [whole]);
}

/// Two registrations, of which one is done while the other still copies, make one image.
#[test]
fn whoever_registers_meanwhile_has_registered_it() {
    let Some(built) = built() else { return };
    let dir = tempfile::tempdir().unwrap();
    let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
    let mut meanwhile = None;
    let mut progress = |_| {
        meanwhile.get_or_insert_with(|| built.register(&region).unwrap());
    };
    let image = built.register_with(&region, &mut progress).unwrap();
    assert_eq!(Some(&image), meanwhile.as_ref());
    assert_eq!(region.images().unwrap(), [image]);
}

#[test]
fn what_has_its_name_and_is_not_it_is_refused_before_anything_is_copied() {
    use ami_core::{AnyAmi, Catalog as _, ImageState};
    use instance_core::ImageSource;

    let Some(built) = built() else { return };
    let large = tempfile::NamedTempFile::new().unwrap();
    fs::copy(built.disk(), &large).unwrap();
    large.as_file().set_len(2 << 30).unwrap();
    for (what, disk) in [("is disabled", &*built.disk()), ("has a root volume of another size", large.path())]
    {
        let disk = storage_block::RawFile::open(disk, true).unwrap().into_disk();
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open(dir.path(), FakeHypervisor::new()).unwrap();
        let publisher = region.as_account(PUBLISHER.parse().unwrap());
        let builder = AnyAmi::builder_for(X86_64, built.ami_name());
        let image = publisher.register_image(builder, ImageSource::new(&disk)).unwrap();
        let image = publisher.image(image.id()).unwrap();
        if what == "is disabled" {
            let mut disabled = image.clone();
            disabled.set_state(ImageState::Disabled).unwrap();
            region.catalog().update(&image, disabled).unwrap();
        }
        let error = built.register_with(&region, &mut |_| panic!("it copies")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Region, "{what}");
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.ends_with(what), "{why}");
    }
}

#[test]
fn what_another_build_has_replaced_is_not_registered_by_its_name() {
    let Some(built) = built() else { return };
    let dir = tempfile::tempdir().unwrap();
    for name in ["vmlinuz", "initrd.img", "disk.raw"] {
        std::os::unix::fs::symlink(built.dir().join(name), dir.path().join(name)).unwrap();
    }
    let text = fs::read_to_string(built.dir().join("build.json")).unwrap();
    fs::write(dir.path().join("build.json"), &text).unwrap();
    let found = build(dir.path()).find().unwrap();
    fs::write(dir.path().join("build.json"), text.replace("busybox-static", "another")).unwrap();

    let home = tempfile::tempdir().unwrap();
    let region = Region::open(home.path(), FakeHypervisor::new()).unwrap();
    assert_eq!(found.register(&region).unwrap_err().kind(), ErrorKind::ImageReplaced);
    fs::remove_file(dir.path().join("build.json")).unwrap();
    assert_eq!(found.register(&region).unwrap_err().kind(), ErrorKind::ImageReplaced);
    assert!(region.images().unwrap().is_empty());
}
