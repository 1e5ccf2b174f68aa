//! What the fuzzer found worth keeping, replayed.

#[path = "../fuzz/targets.rs"]
mod targets;

fn replay(name: &str, target: fn(&[u8])) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut count = 0;
    for file in std::fs::read_dir(&folder).expect("the corpus is there") {
        let path = file.expect("a file").path();
        target(&std::fs::read(&path).expect("it can be read"));
        count += 1;
    }
    assert!(count > 5, "{count} inputs of {name}");
}

#[test]
fn the_corpus_is_harmless() {
    replay("decode", targets::decode);
    replay("merge", targets::merge);
    replay("stitch", targets::stitch);
    replay("bodies", targets::bodies);
}
