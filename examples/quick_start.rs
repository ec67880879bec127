//! The Quick Start AMIs: which there are, and one of them built, registered and launched.
//!
//! ```text
//! $ cargo run --package ami-examples --example quick_start -- target/guest
//! ```

use std::error::Error;
use std::path::PathBuf;

use ami_core::{DescribeImages, Filter};
use ami_examples::{hypervisor, soon};
use instance_core::{LaunchSpec, Region};
use quick_start::{Build, DescribeRecipes};

fn main() -> Result<(), Box<dyn Error>> {
    // What was built there before is there at once.
    let dir = std::env::args().nth(1).map_or_else(|| PathBuf::from("target/guest"), PathBuf::from);
    for recipe in DescribeRecipes::new().answer()?.items {
        let can = recipe.check_host().map_or_else(|why| why.to_string(), |()| "can be built here".to_owned());
        println!("{}: {} ({can})", recipe.name(), recipe.description());
    }
    let recipe = quick_start::recipe("minimal")?;
    let build = Build::new(recipe, dir.join("amd64")).packages(dir.join("packages"));
    let built = build.run_with(&mut |progress| println!("{} % {}", progress.done, progress.what))?;

    let home = tempfile::tempdir()?;
    let region = Region::open(home.path(), hypervisor()?)?;
    built.register(&region)?;
    let request = DescribeImages::new().owner("amazon".parse()?).filter(Filter::new("name", ["minimal-*"])?);
    for image in region.describe_images(&request)?.items {
        println!("{} is {}, of {} packages", image.id(), image.ami().name(), built.packages().len());
        let server = region.launch(image.ami(), LaunchSpec::new("t2.nano".parse()?))?;
        server.console().reader().wait_for("AMI GUEST READY", soon())?;
        println!("{} is up", server.id());
        server.terminate()?;
    }
    Ok(())
}
