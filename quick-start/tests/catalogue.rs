//! The catalogue: what is in it, how it is searched, and what it says of hosts that lack something.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeSet;
use std::process::Command;

use ami_core::Architecture::{Arm64, X86, X86_64};
use quick_start::{Build, DescribeRecipes, ErrorKind, Recipe, recipe, recipes};

fn names(found: &[&Recipe]) -> String {
    found.iter().map(|recipe| recipe.name()).collect::<Vec<_>>().join(" ")
}

#[test]
fn every_recipe_says_what_it_makes_and_what_it_takes() {
    let names: Vec<_> = recipes().iter().map(Recipe::name).collect();
    assert!(names.is_sorted() && names.len() == names.iter().collect::<BTreeSet<_>>().len(), "{names:?}");
    for one in recipes() {
        let name = one.name();
        assert_eq!(recipe(name).unwrap(), one);
        assert!(!one.description().is_empty() && one.description().len() < 120, "{name}");
        assert_eq!(one.architectures().next(), Some(X86_64), "{name}");
        assert!(one.disk_size() > 256 << 20 && one.requirements().space > 256 << 20, "{name}");
        assert!(["root", "debian"].contains(&one.login_user()), "{name}");
        let os = one.operating_system().unwrap();
        assert!(!os.name().is_empty() && !os.version().is_empty(), "{name}");
        for wanted in ["apt-get", "dpkg-deb", "fakeroot", "mke2fs"] {
            let programs = one.requirements().prerequisites;
            assert!(programs.iter().any(|program| program.name() == wanted), "{name} without {wanted}");
        }
    }
    assert_eq!(recipe("debian-12").unwrap_err().kind(), ErrorKind::RecipeNotFound);
}

#[test]
fn the_catalogue_is_searched_with_filters() {
    let all = "debian-12-cloud debian-12-minimal debian-13-minimal minimal";
    for (filters, expected) in [
        (&[][..], all),
        (&[("name", &["minimal"][..])], "minimal"),
        (&[("name", &["*minimal"])], "debian-12-minimal debian-13-minimal minimal"),
        (&[("name", &["debian-1?-cloud", "minimal"])], "debian-12-cloud minimal"),
        (&[("name", &["Debian*"])], ""),
        (&[("name", &["debian-*"]), ("architecture", &["i386"])], "debian-12-minimal"),
        (&[("architecture", &["arm64"])], ""),
        (&[("operating-system", &["debian 13"]), ("name", &["debian*"])], "debian-13-minimal"),
        (&[("owner-alias", &["amazon"])], all),
        (&[("owner-alias", &["aws-marketplace"])], ""),
        (&[("description", &["*SSH*"])], "debian-12-cloud"),
        (&[("buildable", &["true", "false"])], all),
        (&[("buildable", &["perhaps"])], ""),
    ] {
        let request = filters.iter().fold(DescribeRecipes::new(), |request, (name, values)| {
            request.filter(*name, values.iter().copied())
        });
        assert_eq!(names(&request.answer().unwrap().items), expected, "{filters:?}");
    }
    let refused = |request: DescribeRecipes| request.answer().unwrap_err().kind();
    assert_eq!(refused(DescribeRecipes::new().filter("colour", ["red"])), ErrorKind::InvalidParameter);
    assert_eq!(refused(DescribeRecipes::new().filter("name", [""; 0])), ErrorKind::InvalidParameter);
    assert_eq!(refused(DescribeRecipes::new().filter("name", [""; 201])), ErrorKind::InvalidParameter);
    assert_eq!(refused(DescribeRecipes::new().max_results(0)), ErrorKind::InvalidParameter);
    assert_eq!(refused(DescribeRecipes::new().next_token("?")), ErrorKind::InvalidNextToken);
}

#[test]
fn pages_follow_each_other() {
    let mut request = DescribeRecipes::new().max_results(3);
    let first = request.answer().unwrap();
    assert_eq!(names(&first.items), "debian-12-cloud debian-12-minimal debian-13-minimal");
    request = request.next_token(first.next_token.unwrap());
    let second = request.answer().unwrap();
    assert_eq!((names(&second.items), second.next_token), ("minimal".to_owned(), None));
}

#[test]
fn an_architecture_that_a_recipe_is_not_for_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    for (name, architecture) in [("minimal", Arm64), ("minimal", X86), ("debian-12-cloud", Arm64)] {
        let build = Build::new(recipe(name).unwrap(), dir.path().join("image")).architecture(architecture);
        assert_eq!(build.run().unwrap_err().kind(), ErrorKind::UnsupportedArchitecture, "{name}");
        assert_eq!(build.find(), None);
    }
    assert!(!dir.path().join("image").exists());
}

/// In a process of its own, whose search path has nothing on it but what the test has put there.
#[test]
fn what_a_host_lacks_is_named_all_at_once() {
    const STAGE: &str = "QUICK_START_TEST_STAGE";
    let dir = tempfile::tempdir().unwrap();
    if let Some(apt) = std::env::var_os(STAGE) {
        let error = recipe("debian-12-cloud").unwrap().check_host().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingPrerequisite, "{error}");
        let missing: Vec<_> = error.missing().iter().map(|p| p.name()).collect();
        for program in ["dpkg-deb", "fakeroot"] {
            assert!(missing.contains(&program), "{program}: {missing:?}");
        }
        assert_eq!(missing.contains(&"apt-get"), apt == "without apt", "{missing:?}");
        let line = error.install_command();
        assert_eq!(line.is_some(), apt == "with apt", "{line:?}");
        if let Some(line) = line {
            assert!(line.contains("apt-get install -y ") && line.contains(" fakeroot"), "{line}");
            assert!(error.to_string().contains(&line), "{error}");
        }
        let image = dir.path().join("image");
        let build = Build::new(recipe("minimal").unwrap(), &image);
        assert_eq!(build.run().unwrap_err().kind(), ErrorKind::MissingPrerequisite);
        assert!(!image.exists(), "it began its work");
        return;
    }
    let path = dir.path().join("bin");
    std::fs::create_dir(&path).unwrap();
    for apt in ["without apt", "with apt"] {
        if apt == "with apt" {
            std::os::unix::fs::symlink("/bin/sh", path.join("apt-get")).unwrap();
        }
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", "what_a_host_lacks_is_named_all_at_once"]);
        let output = again.env("PATH", &path).env(STAGE, apt).output().unwrap();
        assert!(output.status.success(), "{apt}: {}", String::from_utf8_lossy(&output.stdout));
    }
}
