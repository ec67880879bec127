//! `cargo bench -p ami-benches --bench launch`: what `cargo xtask figures launch` measures, in seconds.
#![allow(missing_docs, reason = "criterion makes functions without")]

use std::time::Duration;

use ami_benches::launch;
use criterion::{Criterion, criterion_group, criterion_main};

/// Benchmarks what can be timed; says why the rest cannot.
fn bench<T>(
    c: &mut Criterion,
    name: &str,
    subject: anyhow::Result<T>,
    mut once: impl FnMut(&T) -> anyhow::Result<Duration>,
) {
    match subject {
        Ok(subject) => {
            c.bench_function(name, |b| {
                b.iter_custom(|times| (0..times).map(|_| once(&subject).expect("it can be done")).sum());
            });
        }
        Err(error) => eprintln!("SKIPPED: {name}: {error:#}"),
    }
}

fn launches(c: &mut Criterion) {
    bench(c, "first_instruction/launch", launch::bare_metal(), |launcher| launcher.launch_until_it_speaks());
    bench(c, "first_instruction/bare", launch::bare_ioctls(), |_| launch::bare_ioctls());
    bench(c, "first_userspace_line", launch::linux(), |launcher| launcher.launch_until(launch::FIRST_LINE));
    for gib in [1, 256] {
        bench(c, &format!("launch/{gib} GiB"), launch::of_size(gib), |launcher| launcher.launch());
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3));
    targets = launches
}
criterion_main!(benches);
