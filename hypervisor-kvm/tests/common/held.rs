//! What the host keeps of machines' memory.

/// What the host keeps of mappings of this length: others of this process's tests have less memory.
pub(crate) fn private_bytes(len: u64) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines();
    let mut bytes = 0;
    while let Some(line) = lines.next() {
        let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) else {
            continue;
        };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) else {
            continue;
        };
        // A neighbour of the same kind may be shown as one with it.
        if end - start >= len {
            let rss = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
            bytes += rss.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10;
        }
    }
    bytes
}
