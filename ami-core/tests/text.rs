//! What has a text form: which texts are read, and as what.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use ami_core::{
    AccountId, AmiId, Architecture, BootMode, Category, DeviceName, Error, ImageState, InstanceId,
    MalformedId, OsFamily, OwnerAlias, RegionName, Timestamp, VolumeId, VolumeType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Reads each text, from text and from JSON, and checks that a good one comes back as it was.
fn check<T>(good: &[&str], bad: &[&str])
where
    T: FromStr<Err: Debug> + Display + Debug + PartialEq + Serialize + DeserializeOwned,
{
    for text in good {
        let value: T = text.parse().unwrap_or_else(|err| panic!("{text:?}: {err:?}"));
        assert_eq!(value.to_string(), *text);
        let json = serde_json::to_string(&value).unwrap();
        assert_eq!(json, serde_json::to_string(text).unwrap());
        assert_eq!(serde_json::from_str::<T>(&json).unwrap(), value);
    }
    for text in bad {
        assert!(text.parse::<T>().is_err(), "{text:?}");
        assert!(serde_json::from_value::<T>((*text).into()).is_err(), "{text:?} in JSON");
    }
}

#[test]
fn ids() {
    check::<AmiId>(
        &[
            "ami-0123456789abcdef0",
            "ami-fffffffffffffffff",
            "ami-00000000000000000",
            "ami-1a2b3c4d",
            "ami-00000000",
        ],
        &[
            "",
            "ami",
            "ami-",
            "ami-0",
            "0123456789abcdef0",
            "i-0123456789abcdef0",
            "AMI-0123456789abcdef0",
            "ami-0123456789ABCDEF0",
            "ami-0123456789abcdef",
            "ami-0123456789abcdef01",
            "ami-0123456789abcdeg0",
            "ami-+123456789abcdef0",
            "ami-1a2b3c4",
            "ami-1a2b3c4d5",
            " ami-0123456789abcdef0",
            "ami-0123456789abcdef0\n",
            "ami-0123456789abcdé0",
            "ami--1a2b3c4d",
        ],
    );
    // The same digits, long and short, are two ids.
    let (short, long): (AmiId, AmiId) =
        ("ami-1a2b3c4d".parse().unwrap(), "ami-0000000001a2b3c4d".parse().unwrap());
    assert_ne!(short, long);
}

#[test]
fn an_id_is_the_first_68_bits() {
    let bytes = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x0f\xff\xff\xff\xff\xff\xff\xff";
    assert_eq!(AmiId::from_bytes(bytes).to_string(), "ami-0123456789abcdef0");
    assert_eq!(InstanceId::from_bytes([0xff; 16]).to_string(), "i-fffffffffffffffff");
    assert_ne!(VolumeId::random().unwrap(), VolumeId::random().unwrap());
}

#[test]
fn codes_of_malformed_ids() {
    let code = |err: MalformedId| (err.code(), Error::from(err).code());
    assert_eq!(code("x".parse::<AmiId>().unwrap_err()).0, "InvalidAMIID.Malformed");
    let (own, converted) = code("x".parse::<InstanceId>().unwrap_err());
    assert_eq!((own, converted), ("InvalidInstanceID.Malformed", "InvalidInstanceID.Malformed"));
}

#[test]
fn messages_quote_no_more_than_a_line() {
    let long = "é".repeat(1 << 20);
    let messages = [
        long.parse::<AmiId>().unwrap_err().to_string(),
        long.parse::<ami_core::Digest>().unwrap_err().to_string(),
        long.parse::<Architecture>().unwrap_err().to_string(),
        long.parse::<DeviceName>().unwrap_err().to_string(),
        long.parse::<RegionName>().unwrap_err().to_string(),
        long.parse::<AccountId>().unwrap_err().to_string(),
        long.parse::<Timestamp>().unwrap_err().to_string(),
        long.parse::<VolumeType>().unwrap_err().to_string(),
    ];
    for message in messages {
        assert!(message.len() < 400, "{} bytes", message.len());
    }
}

#[test]
fn regions_and_accounts() {
    let longest = "r".repeat(64);
    check::<RegionName>(
        &["us-east-1", "local", "a", "-", longest.as_str()],
        &["", "US-EAST-1", "us_east_1", "us east", "é", "a\n", "../etc", "r".repeat(65).as_str()],
    );
    check::<AccountId>(
        &["123456789012", "000000000000", "999999999999"],
        &[
            "",
            "12345678901",
            "1234567890123",
            "+12345678901",
            "12345678901a",
            "１23456789012",
            " 23456789012",
        ],
    );
}

#[test]
fn device_names() {
    check::<DeviceName>(
        &[
            "/dev/sda",
            "/dev/sda1",
            "/dev/sdz15",
            "/dev/xvda",
            "/dev/xvdba",
            "/dev/xvdzz",
            "xvdh",
            "sdf",
            "sdf9",
            "/dev/nvme0n1",
            "/dev/nvme26n1",
        ],
        &[
            "",
            "/dev/",
            "sd",
            "xvd",
            "/dev/sd",
            "/dev/hda",
            "/dev/sda0",
            "/dev/sda16",
            "/dev/sda01",
            "/dev/sda1x",
            "/dev/sdaa",
            "/dev/sdA",
            "/dev/xvd",
            "/dev/xvdaaa",
            "/dev/xvda1",
            "/dev/xvdA",
            "/dev/nvme27n1",
            "/dev/nvme00n1",
            "/dev/nvmen1",
            "/dev/nvme0n2",
            "/dev/nvme0n1p1",
            "nvme0n1",
            "/dev/../sda",
            "/dev/sda ",
            "/dev/sda+1",
            "/dev/nvme+1n1",
            "/dev/sdé",
            "dev/sda",
            "/dev//dev/sda",
        ],
    );
}

#[test]
fn names_of_one_disk() {
    let one = [
        ("/dev/sda1", "/dev/xvda", true),
        ("/dev/sda1", "/dev/sda2", true),
        ("sdb", "/dev/xvdb", true),
        ("xvdba", "/dev/xvdba", true),
        ("/dev/sda", "/dev/sdb", false),
        ("/dev/xvdb", "/dev/xvdba", false),
        ("/dev/nvme1n1", "/dev/nvme0n1", false),
        ("/dev/nvme1n1", "/dev/nvme11n1", false),
    ];
    for (a, b, same) in one {
        let (a, b): (DeviceName, DeviceName) = (a.parse().unwrap(), b.parse().unwrap());
        assert_eq!((a.same_disk(&b), b.same_disk(&a)), (same, same), "{a} and {b}");
    }
}

#[test]
fn timestamps() {
    check::<Timestamp>(
        &[
            "1970-01-01T00:00:00.000Z",
            "2026-01-31T12:00:00.250Z",
            "2024-02-29T23:59:59.999Z",
            "9999-12-31T23:59:59.999Z",
        ],
        &[
            "",
            "now",
            "2026-01-31",
            "2026-01-31 12:00",
            "1969-12-31T23:59:59.999Z",
            "10000-01-01T00:00:00.000Z",
            "2026-13-01T00:00:00.000Z",
            "2026-02-29T00:00:00.000Z",
            "2026-01-31T12:00:00.000",
            "2026-01-31T12:00:00.000+01:00",
        ],
    );
    let seconds: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
    assert_eq!(seconds.to_string(), "2026-01-31T12:00:00.000Z");
    assert_eq!(Timestamp::from_unix_millis(Timestamp::MAX.as_unix_millis()), Some(Timestamp::MAX));
    assert_eq!(Timestamp::from_unix_millis(Timestamp::MAX.as_unix_millis() + 1), None);
    assert!(Timestamp::now() > seconds.min(Timestamp::MIN));
}

#[test]
fn words() {
    let bad = ["", " ", "X"];
    check::<Architecture>(&["i386", "x86_64", "arm64"], &["amd64", "x86-64", "X86_64"]);
    check::<ImageState>(&ImageState::ALL.iter().map(|w| w.as_str()).collect::<Vec<_>>(), &bad);
    check::<Category>(&Category::ALL.iter().map(|w| w.as_str()).collect::<Vec<_>>(), &bad);
    check::<OwnerAlias>(&OwnerAlias::ALL.iter().map(|w| w.as_str()).collect::<Vec<_>>(), &bad);
    check::<OsFamily>(&OsFamily::ALL.iter().map(|w| w.as_str()).collect::<Vec<_>>(), &bad);
    check::<BootMode>(&BootMode::ALL.iter().map(|w| w.as_str()).collect::<Vec<_>>(), &bad);
    check::<VolumeType>(&VolumeType::ALL.iter().map(|w| w.as_str()).collect::<Vec<_>>(), &bad);
}
