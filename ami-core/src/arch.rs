//! Processor architectures: as a value, and as a type.
//!
//! A program that knows the architecture of its images when it is compiled uses the marker types
//! ([`X86`], [`X86_64`], [`Arm64`]), and the compiler then refuses to launch an image on a
//! hypervisor that cannot run it. A program that learns it at run time uses [`AnyArch`] and gets an
//! error instead.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::quote;

/// A processor architecture, under the name that EC2 gives it.
///
/// ```
/// use ami_core::Architecture;
///
/// assert_eq!("arm64".parse(), Ok(Architecture::Arm64));
/// assert_eq!(Architecture::ALL.map(Architecture::as_str), ["i386", "x86_64", "arm64"]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Architecture {
    /// 32-bit x86, `i386`.
    #[serde(rename = "i386")]
    X86,
    /// 64-bit x86, `x86_64`.
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit ARM, `arm64`.
    #[serde(rename = "arm64")]
    Arm64,
}

impl Architecture {
    /// Every architecture that an image can have.
    pub const ALL: [Architecture; 3] = [Self::X86, Self::X86_64, Self::Arm64];

    /// The name in the EC2 API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::X86 => "i386",
            Self::X86_64 => "x86_64",
            Self::Arm64 => "arm64",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A name that is no architecture of EC2's.
///
/// ```
/// use ami_core::Architecture;
///
/// let found = "riscv64".parse::<Architecture>().map_err(|e| e.to_string());
/// let problem = r#""riscv64" is not an architecture; use i386, x86_64 or arm64"#;
/// assert_eq!(found, Err(problem.to_owned()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is not an architecture; use i386, x86_64 or arm64", quote(.0))]
pub struct UnknownArchitecture(String);

impl FromStr for Architecture {
    type Err = UnknownArchitecture;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|a| a.as_str() == name).ok_or_else(|| UnknownArchitecture(name.to_owned()))
    }
}

mod sealed {
    pub trait Sealed {}
}

/// An architecture as a type: one of [`X86`], [`X86_64`], [`Arm64`], or [`AnyArch`] where it is
/// known only at run time. Sealed: there are no others.
///
/// ```
/// use ami_core::{Ami, Arch, Arm64, X86_64};
///
/// /// For an image of any architecture, known or not.
/// fn words<A: Arch>(_image: &Ami<A>) -> &'static str {
///     match A::ARCHITECTURE {
///         Some(architecture) => architecture.as_str(),
///         None => "known at run time",
///     }
/// }
/// assert_ne!(X86_64::ARCHITECTURE, Arm64::ARCHITECTURE);
/// let _ = words::<Arm64>;
/// ```
pub trait Arch: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The architecture, or `None` for [`AnyArch`].
    const ARCHITECTURE: Option<Architecture>;
}

macro_rules! markers {
    ($($(#[$doc:meta])* $name:ident => $value:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// ```
        #[doc = concat!("use ami_core::{Ami, Arch, Architecture, ", stringify!($name), "};")]
        ///
        #[doc = concat!("fn name(image: &Ami<", stringify!($name), ">) -> &str {")]
        ///     image.name()
        /// }
        #[doc = concat!("assert_eq!(", stringify!($name), "::ARCHITECTURE, ", stringify!($value), ");")]
        /// ```
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name;
        impl sealed::Sealed for $name {}
        impl Arch for $name {
            const ARCHITECTURE: Option<Architecture> = $value;
        }
    )*};
}

markers! {
    /// 32-bit x86.
    X86 => Some(Architecture::X86);
    /// 64-bit x86.
    X86_64 => Some(Architecture::X86_64);
    /// 64-bit ARM.
    Arm64 => Some(Architecture::Arm64);
    /// An architecture known only at run time.
    AnyArch => None;
}
