//! A child process writes, prints what was acknowledged, and is killed: everything that it printed must be in the file.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use hanse_store::{Key, Prefix, StoreUrl, Transaction, create, open};

const PATH: &str = "HANSE_STORE_CRASH_PATH";

/// Writes until it is killed, and prints what was acknowledged.
async fn write_for_ever(path: &std::path::Path) {
    let store = if path.exists() { open(&StoreUrl::file(path)).await } else { create(&StoreUrl::file(path)).await };
    let store = store.unwrap();
    let mut out = std::io::stdout();
    let start = store.revision().await.unwrap();
    for i in start.. {
        let i = i.to_string();
        // Two keys in one transaction: both or neither.
        let both = Transaction::default()
            .put(Key::new(&["a", &i]).unwrap(), i.clone())
            .put(Key::new(&["b", &i]).unwrap(), i.clone());
        store.commit(both).await.unwrap();
        writeln!(out, "acknowledged {i}").unwrap();
        out.flush().unwrap();
    }
}

#[tokio::test]
async fn keeps_every_acknowledged_transaction_after_kill_9() {
    // This test, run as its own child.
    if let Ok(path) = std::env::var(PATH) {
        return write_for_ever(path.as_ref()).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let mut acknowledged = Vec::new();
    // The kill may hit any instant of a write: the printed seed repeats them.
    let seed = std::env::var("HANSE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into()
    });
    println!("seed {seed}");
    let mut random: u64 = seed;
    for round in 0..12_usize {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "crash::keeps_every_acknowledged_transaction_after_kill_9",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(PATH, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let numbers = |line: String| line.rsplit_once("acknowledged ").and_then(|(_, n)| n.parse::<u64>().ok());
        let wanted = 3 + round * 3;
        let mut seen = 0;
        while seen < wanted {
            let line = lines.next().expect("the child writes until it is killed").unwrap();
            if let Some(number) = numbers(line) {
                acknowledged.push(number);
                seen += 1;
            }
        }
        // A write takes a few milliseconds, most of them in the flush.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(std::time::Duration::from_micros((random >> 33) % 8_000));
        child.kill().unwrap();
        // Lines that were printed before the signal count too.
        acknowledged.extend(lines.map_while(Result::ok).filter_map(numbers));
        child.wait().unwrap();
    }
    let store = open(&StoreUrl::file(&path)).await.unwrap();
    for number in &acknowledged {
        let number = number.to_string();
        assert!(store.read(&Key::new(&["a", &number]).unwrap()).await.unwrap().is_some(), "{number} was acknowledged");
    }
    let [a, b] = ["a", "b"].map(|p| Prefix::new(&[p]).unwrap());
    let (a, b) = (store.list(&a).await.unwrap().entries.len(), store.list(&b).await.unwrap().entries.len());
    assert_eq!(a, b, "transactions are whole");
    println!("acknowledged {} transactions over 12 kills; the file has {a}", acknowledged.len());
}
