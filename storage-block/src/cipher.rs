//! AES-256-XTS, keyed digests, and how the keys for both come out of a data key.

use std::fmt;

use aes::cipher::{BlockDecrypt as _, BlockEncrypt as _, KeyInit as _};
use aes::{Aes256, Block};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use zeroize::{ZeroizeOnDrop, Zeroizing};

use crate::format::{BLOCK, Id};

/// A key of 32 bytes, or what is derived from one; overwritten when it goes.
pub(crate) type Secret = Zeroizing<[u8; 32]>;

/// Blocks of the cipher that are encrypted at once: the processor has several in its pipeline, and one after the other
/// takes four times as long, which is why the mode is here and not a crate's.
const AT_ONCE: usize = 8;
const CIPHER_BLOCK: usize = 16;

/// AES-256-XTS (IEEE Std 1619) over data units of 4 KiB. Its key schedules are overwritten when it goes.
pub(crate) struct Xts(Box<Keys>);

struct Keys {
    data: Aes256,
    tweak: Aes256,
}

impl Xts {
    /// `data` encrypts the bytes, `tweak` the numbers of their units.
    pub(crate) fn new(data: &Secret, tweak: &Secret) -> Self {
        let aes = |key: &Secret| Aes256::new((&**key).into());
        Self(Box::new(Keys { data: aes(data), tweak: aes(tweak) }))
    }

    /// The key that `label` names among those of a data key.
    pub(crate) fn derive(data_key: &Secret, label: &str, salt: &[u8]) -> Self {
        let part = |part| derive(data_key, &[label.as_bytes(), &[0, part], salt]);
        Self::new(&part(1), &part(2))
    }

    /// Encrypts units in place; the first has the number `unit`, and those after it the numbers after that. All is in
    /// blocks of 16 bytes.
    pub(crate) fn encrypt(&self, bytes: &mut [u8], unit: u128) {
        self.run(bytes, unit, |blocks| self.0.data.encrypt_blocks(blocks));
    }

    /// Undoes [`encrypt`](Self::encrypt).
    pub(crate) fn decrypt(&self, bytes: &mut [u8], unit: u128) {
        self.run(bytes, unit, |blocks| self.0.data.decrypt_blocks(blocks));
    }

    fn run(&self, bytes: &mut [u8], unit: u128, cipher: impl Fn(&mut [Block])) {
        for (bytes, number) in bytes.chunks_mut(BLOCK as usize).zip(0..) {
            let mut tweak = Block::from(unit.wrapping_add(number).to_le_bytes());
            self.0.tweak.encrypt_block(&mut tweak);
            let mut tweak = u128::from_le_bytes(tweak.into());
            for bytes in bytes.chunks_mut(AT_ONCE * CIPHER_BLOCK) {
                let (mut blocks, mut tweaks) = ([Block::default(); AT_ONCE], [0; AT_ONCE]);
                let count = bytes.len() / CIPHER_BLOCK;
                for ((block, mask), plain) in
                    blocks.iter_mut().zip(&mut tweaks).zip(bytes.chunks_exact(CIPHER_BLOCK))
                {
                    block.copy_from_slice(plain);
                    *mask = tweak;
                    xor(block, tweak);
                    tweak = double(tweak);
                }
                cipher(&mut blocks[..count]);
                for ((block, mask), out) in
                    blocks.iter_mut().zip(&tweaks).zip(bytes.chunks_exact_mut(CIPHER_BLOCK))
                {
                    xor(block, *mask);
                    out.copy_from_slice(block);
                }
            }
        }
    }
}

fn xor(block: &mut Block, mask: u128) {
    let bytes: [u8; CIPHER_BLOCK] = (*block).into();
    *block = (u128::from_le_bytes(bytes) ^ mask).to_le_bytes().into();
}

/// Twice a number in the field that the mode counts in.
fn double(tweak: u128) -> u128 {
    (tweak << 1) ^ ((tweak >> 127) * 0x87)
}

impl fmt::Debug for Xts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Xts")
    }
}

/// What is overwritten when it goes: this does not compile where the crates' features for that are off. The state of a
/// keyed hash is two of the hash's.
const _: () = {
    const fn is_overwritten<T: ZeroizeOnDrop>() {}
    is_overwritten::<Secret>();
    is_overwritten::<Aes256>();
    is_overwritten::<Sha256>();
};

/// The HMAC-SHA-256 of all parts, one after the other.
pub(crate) fn derive(key: &Secret, parts: &[&[u8]]) -> Secret {
    Zeroizing::new(mac(key, parts))
}

/// The keyed name of some content.
pub(crate) fn keyed_digest(key: &Secret, bytes: &[u8]) -> Id {
    mac(key, &[bytes])
}

fn mac(key: &Secret, parts: &[&[u8]]) -> [u8; 32] {
    // A key that is as short as a block of the hash is used as it is, filled up with zeroes.
    let mut block = Zeroizing::new([0; 64]);
    block[..32].copy_from_slice(&**key);
    let mut mac = <Hmac<Sha256> as KeyInit>::new((&*block).into());
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(hex: &str) -> Secret {
        Zeroizing::new(hex::decode(hex).unwrap().try_into().unwrap())
    }

    /// IEEE Std 1619-2007, annex B, vectors 10, 11 and 14: AES-256, data units of 512 bytes.
    #[test]
    fn xts_agrees_with_the_vectors_of_its_standard() {
        let xts = Xts::new(
            &secret("2718281828459045235360287471352662497757247093699959574966967627"),
            &secret("3141592653589793238462643383279502884197169399375105820974944592"),
        );
        let plain: Vec<u8> = (0..512).map(|at| at as u8).collect();
        for (unit, expected) in [
            (
                0xff,
                "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44",
            ),
            (
                0xffff,
                "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11e1d0225438e093242d6db274fde801d4",
            ),
            (
                0xff_ffff_ffff,
                "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed2350eae7e96087c8a0db51ad290bd00c1a",
            ),
        ] {
            let mut bytes = plain.clone();
            xts.encrypt(&mut bytes, unit);
            assert_eq!(hex::encode(&bytes[..48]), expected, "unit {unit:#x}");
            xts.decrypt(&mut bytes, unit);
            assert_eq!(bytes, plain);
        }
    }

    /// Units of 4 KiB, and two of them: `openssl enc` does not know XTS, so these come from OpenSSL's library.
    #[test]
    fn xts_agrees_with_openssl() {
        let key = |byte| Zeroizing::new([byte; 32]);
        let xts = Xts::new(&key(1), &key(2));
        let plain: Vec<u8> = (0..8192u32).map(|at| (at * 7 + at / 256) as u8).collect();
        let mut bytes = plain.clone();
        xts.encrypt(&mut bytes, 5);
        let digest = |bytes: &[u8]| ami_core::Digest::of(bytes).to_hex();
        assert_eq!(
            digest(&bytes[..4096]),
            "dd9d9cbcfa041ceeeeb7cb60f8f6be88bcc5ad5a8862ecaa28ca22d3236f2476"
        );
        assert_eq!(
            digest(&bytes[4096..]),
            "c0f73250ed75a4698d2121acd5c2551bfa01c68d8e80a4b05ce3dbdfc0a564ed"
        );
        xts.decrypt(&mut bytes[4096..], 6);
        assert_eq!(bytes[4096..], plain[4096..]);
    }

    /// RFC 4231, test case 1, whose key of 20 bytes is as good as one filled up with zeroes; and that labels and
    /// salts make other keys.
    #[test]
    fn keyed_digests_are_hmacs() {
        let mut key = [0; 32];
        key[..20].fill(0x0b);
        let found = keyed_digest(&Zeroizing::new(key), b"Hi There");
        assert_eq!(hex::encode(found), "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");

        let key = Zeroizing::new([3; 32]);
        let block = |label, salt: &[u8]| {
            let mut bytes = [0; 16];
            Xts::derive(&key, label, salt).encrypt(&mut bytes, 0);
            bytes
        };
        let all = [block("a", b""), block("b", b""), block("a", b"x"), block("b", b"x")];
        assert!((0..4).all(|one| (0..one).all(|other| all[one] != all[other])));
        assert_eq!(block("a", b"x"), all[2]);
    }
}
