//! 64-bit values in registers of 32 bits.

/// The half of a 64-bit value that a selector names; others are zero.
pub(super) fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// Sets the half that a selector names; others are nobody's.
pub(super) fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
