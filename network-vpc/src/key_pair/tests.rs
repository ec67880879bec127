//! Keys and their fingerprints.

use super::*;

#[test]
fn a_created_key_is_one_that_openssh_reads() {
    let made = create("mine", KeyType::Ed25519).unwrap();
    let private = PrivateKey::from_openssh(&made.private_key).unwrap();
    assert_eq!(private.public_key().to_openssh().unwrap(), made.key_pair.public_key);
    assert!(made.key_pair.public_key.ends_with(" mine"));
    assert_eq!(import("mine", &made.key_pair.public_key).unwrap().fingerprint, made.key_pair.fingerprint);
    assert!(!format!("{made:?}").contains("PRIVATE"));
}

#[test]
fn what_is_no_key_is_refused() {
    let ecdsa = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBHwf2HMM5TRXvo2SQJjsNkiDD5KqiiNjrGVv3UUh+mMT5RHxiRtOnlqvjhQtBq0VpmpCV/PwUdhOig4vkbqAcEc=";
    for text in ["", "ssh-ed25519", "ssh-ed25519 AAAA", "-----BEGIN PUBLIC KEY-----", ecdsa] {
        assert_eq!(import("mine", text).unwrap_err().kind(), ErrorKind::InvalidKeyFormat, "{text}");
    }
}

/// Made by OpenSSL, which gave its fingerprints too: those of `openssl pkcs8 -in KEY -topk8 -nocrypt -outform DER |
/// openssl sha1 -c` and of `openssl rsa -in KEY -pubout -outform DER | openssl md5 -c`.
#[test]
fn fingerprints_are_those_that_users_compute() {
    use rsa::pkcs1::DecodeRsaPrivateKey;
    let pem = include_str!("rsa-2048.pem");
    let made = created_rsa("mine", &rsa::RsaPrivateKey::from_pkcs1_pem(pem).unwrap()).unwrap();
    assert_eq!(made.private_key, pem);
    let sha1 = "07:9d:21:3b:3e:04:5a:03:0a:b9:31:09:75:68:b9:c9:12:8b:dd:11";
    assert_eq!((made.key_pair.fingerprint.as_str(), made.key_pair.key_type()), (sha1, KeyType::Rsa));
    let imported = import("mine", &made.key_pair.public_key).unwrap();
    assert_eq!(imported.fingerprint, "2e:a5:c6:12:6d:74:13:3b:a2:07:e5:ee:f7:d8:f7:4b");

    let ed25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIK7hAq1I0IhoGrWtyizWZkJvMrRqTVXMgjjiEvqxenRK x";
    let imported = import("mine", ed25519).unwrap();
    assert_eq!(imported.fingerprint, "KafoCIgA7hRQN7KjPk6q7jmBA0dDSBIdwkDfYhS7PqM=");
    assert_eq!(imported.public_key, ed25519.replace(" x", " mine"));
}

#[test]
fn an_rsa_key_is_made_with_the_bits_that_it_should_have() {
    use rsa::pkcs1::DecodeRsaPrivateKey;
    use rsa::traits::PublicKeyParts;
    let made = create("mine", KeyType::Rsa).unwrap();
    let private = rsa::RsaPrivateKey::from_pkcs1_pem(&made.private_key).unwrap();
    private.validate().unwrap();
    assert_eq!(private.n().bits(), 2048);
    let public = PublicKey::from_openssh(&made.key_pair.public_key).unwrap();
    let public = rsa::RsaPublicKey::try_from(public.key_data().rsa().unwrap()).unwrap();
    assert_eq!(public, private.to_public_key());
}
