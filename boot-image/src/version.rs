//! The order of versions, as the UAPI Group's version format specification defines it.

use std::cmp::Ordering;

/// Compares two versions; a newer one is greater.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = skip_separators(a);
        b = skip_separators(b);

        // A tilde sorts before everything, even before the end.
        match (a.first(), b.first()) {
            (Some(b'~'), Some(b'~')) => {
                (a, b) = (&a[1..], &b[1..]);
                continue;
            }
            (Some(b'~'), _) => return Ordering::Less,
            (_, Some(b'~')) => return Ordering::Greater,
            (None, None) => return Ordering::Equal,
            (None, _) => return Ordering::Less,
            (_, None) => return Ordering::Greater,
            _ => {}
        }
        // Of the others, the earlier in this list the smaller.
        let mut matched = false;
        for mark in [b'-', b'^', b'.'] {
            match (a[0] == mark, b[0] == mark) {
                (true, true) => {
                    (a, b) = (&a[1..], &b[1..]);
                    matched = true;
                    break;
                }
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                (false, false) => {}
            }
        }
        if matched {
            continue;
        }
        let order;
        if a[0].is_ascii_digit() || b[0].is_ascii_digit() {
            let (x, y);
            (x, a) = split_while(a, u8::is_ascii_digit);
            (y, b) = split_while(b, u8::is_ascii_digit);
            let (x, y) = (without_zeros(x), without_zeros(y));
            order = x.len().cmp(&y.len()).then_with(|| x.cmp(y));
        } else {
            let (x, y);
            (x, a) = split_while(a, u8::is_ascii_alphabetic);
            (y, b) = split_while(b, u8::is_ascii_alphabetic);
            order = x.cmp(y);
        }
        if order != Ordering::Equal {
            return order;
        }
    }
}

fn skip_separators(s: &[u8]) -> &[u8] {
    let counts = |c: &u8| c.is_ascii_alphanumeric() || b"~-^.".contains(c);
    &s[s.iter().position(counts).unwrap_or(s.len())..]
}

fn split_while(s: &[u8], keep: impl Fn(&u8) -> bool) -> (&[u8], &[u8]) {
    s.split_at(s.iter().position(|c| !keep(c)).unwrap_or(s.len()))
}

fn without_zeros(digits: &[u8]) -> &[u8] {
    &digits[digits.iter().position(|c| *c != b'0').unwrap_or(digits.len())..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_specification() {
        // Each line is in ascending order; the first is the specification's own example.
        let lines: [&[&str]; 6] = [
            &["~1", "", "1~rc1", "1"],
            &[
                "122.1",
                "123~rc1-1",
                "123",
                "123-a",
                "123-a.1",
                "123-1",
                "123-1.1",
                "123^post1",
                "123.a-1",
                "123.1-1",
                "123a-1",
                "124-1",
            ],
            &["6.1.0-5-cloud-amd64", "6.1.0-49-cloud-amd64", "6.10.0-1-cloud-amd64", "6.12"],
            &["5.14.0-70.el9", "5.14.0-362.el9", "5.14.0-1000.el9"],
            &["A", "B", "a", "ab", "b"],
            &["9", "10", "18446744073709551615", "18446744073709551616"],
        ];
        for line in lines {
            for (i, a) in line.iter().enumerate() {
                for (j, b) in line.iter().enumerate() {
                    assert_eq!(compare(a, b), i.cmp(&j), "{a:?} and {b:?}");
                }
            }
        }
        for (a, b) in [("01", "1"), ("1_", "1"), ("1:2", "1_2")] {
            assert_eq!(compare(a, b), Ordering::Equal, "{a:?} and {b:?}");
        }
    }
}
