//! What a console keeps and tells.

use super::*;
use std::time::Duration;

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(20)
}

#[test]
fn output_is_kept_to_the_last_64_kib() {
    let console = Console::new();
    console.port().write_output(&vec![b'a'; OUTPUT_KEPT]);
    console.port().write_output(b"tail");
    let kept = console.output();
    assert_eq!(kept.len(), OUTPUT_KEPT);
    assert!(kept.ends_with(b"atail"));
    assert_eq!(console.written(), OUTPUT_KEPT as u64 + 4);
}

#[test]
fn a_text_is_found_across_two_writes_and_what_follows_is_left() {
    let console = Console::new();
    let port = console.port();
    let mut reader = console.reader();
    let thread = std::thread::spawn(move || {
        port.write_output(b"booting... rea");
        port.write_output(b"dy# more");
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    assert_eq!(reader.wait_for("ready#", deadline).unwrap(), b"booting... ready#");
    thread.join().unwrap();
    assert_eq!(reader.read_new(), b" more");
}

#[test]
fn waiting_in_vain_names_the_last_line() {
    let console = Console::new();
    console.port().write_output(b"Linux\nKernel panic\n\n");
    let err = console.reader().wait_for("ready", soon()).unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::TimedOut);
    assert!(err.to_string().contains("Kernel panic"), "{err}");
}

#[test]
fn input_that_nobody_reads_is_bounded() {
    let console = Console::new();
    console.write_all(&vec![0; INPUT_KEPT], soon()).unwrap();
    assert_eq!(console.write_all(b"x", soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
    let mut buf = [0; 100];
    assert_eq!(console.port().read_input(&mut buf), 100);
    console.write_all(b"x", soon()).unwrap();
    assert_eq!(console.port().input_waiting(), INPUT_KEPT - 99);
}

#[test]
fn a_resize_is_told_once_to_whoever_wants_to_know() {
    let console = Console::new();
    let port = console.port();
    let told = Arc::new(Mutex::new(Vec::new()));
    let (seen, reads) = (told.clone(), port.clone());
    port.set_resize_notifier(Some(Arc::new(move || seen.lock().unwrap().push(reads.size().rows))));
    for rows in [25, 50, 50, 25] {
        console.resize(ConsoleSize { columns: 80, rows });
    }
    assert_eq!(*told.lock().unwrap(), [50, 25]);
    port.set_resize_notifier(None);
    console.resize(ConsoleSize { columns: 1, rows: 1 });
    assert_eq!((told.lock().unwrap().len(), port.size().columns), (2, 1));
}

#[test]
fn readers_do_not_disturb_each_other() {
    let console = Console::new();
    let (mut one, mut two) = (console.reader(), console.reader());
    console.port().write_output(b"ab");
    assert_eq!(one.read_new(), b"ab");
    assert_eq!(one.read_new(), b"");
    assert_eq!(two.read_new(), b"ab");
    assert_eq!(console.reader_from_now().read_new(), b"");
}
