//! Quick Start AMIs: a catalogue of recipes for machine images that this machine can build from a distribution's
//! packages, and the way from a recipe to an image in a region.
//!
//! ```no_run
//! # fn register(region: &instance_core::Region) -> Result<(), Box<dyn std::error::Error>> {
//! use quick_start::{Build, DescribeRecipes};
//!
//! let here = DescribeRecipes::new().filter("name", ["debian-*"]).filter("buildable", ["true"]).answer()?;
//! let recipe = here.items.first().ok_or("this machine builds no Debian")?;
//! let built = Build::new(recipe, "images/debian").run_with(&mut |p| println!("{}", p.what))?;
//! let image = built.register(region)?; // public, of the owner alias `amazon`
//! println!("{} is {}; log in as {}", image.id(), image.ami().name(), recipe.login_user());
//! # Ok(())
//! # }
//! ```
//!
//! # Map
//!
//! - [`recipes`] is the catalogue, [`recipe`] one of it by name, and [`DescribeRecipes`] searches it with filters,
//!   wildcards and pages, as images are searched.
//! - [`Recipe`]: what it makes, and what that takes ([`Recipe::requirements`], [`Recipe::check_host`]).
//! - [`Build`] follows a recipe into a directory, tells its [`Progress`], by which it is cancelled, and gives a
//!   [`BuiltImage`], which [registers](BuiltImage::register) itself in a region.
//! - [`PackageSource`], [`Sources`], [`Initrd`] and [`RootDisk`]: what the minimal recipes are made of, for guests of
//!   one's own, and [`made_by`], to keep these.
//! - [`Prerequisite`], [`require`], [`find_program`] and [`command`]: what hosts have installed.
//!
//! # Input, output and errors
//!
//! Calls block. A build writes below its directory and that of its packages and nowhere else; it calls the programs that
//! [`Recipe::requirements`] names, installs nothing, and changes nothing of the host's: where apt's package lists are
//! missing, it fetches some of its own. It reaches the mirror of the distribution and no other place. The programs end with
//! the thread that has called them, and, with all that they have started, when the build is cancelled; what was half made is
//! removed.
//!
//! A directory is found again by `build.json` in it, which is written last and names the recipe, with a digest of all of its
//! texts, and the packages. It is locked while it is built in.
//!
//! An [`Error`] has a [`kind`](Error::kind) to match on; where something has to be installed first, it has
//! [the line](Error::install_command) that does it.
//!
//! # What it trusts
//!
//! The distribution: apt checks its signature and this crate the digests of single packages once more, whose scripts then
//! run as whoever builds. The directories, which others should not be able to write to.
//!
//! # What it leaves out
//!
//! Recipes of other distributions than Debian and what is like it, of other architectures than x86, and such as are written
//! by users: [`Sources`], [`Initrd`] and [`RootDisk`] are for these.

mod apt;
mod archive;
mod build;
mod cloud;
mod describe;
mod disk;
mod distribution;
mod error;
mod host;
mod initrd;
mod lock;
mod minimal;
mod modules;
mod process;
mod progress;
mod recipe;
mod register;
mod rootfs;
mod sources;
mod work;

pub use apt::Package;
pub use build::{Build, BuiltImage};
pub use describe::DescribeRecipes;
pub use disk::RootDisk;
pub use error::{Error, ErrorKind, Result};
pub use host::{Prerequisite, command, find_program, require};
pub use initrd::Initrd;
pub use minimal::made_by;
pub use progress::Progress;
pub use recipe::{Privilege, Recipe, Requirements, recipe, recipes};
pub use register::PUBLISHER;
pub use sources::{PackageSource, Sources};
