//! The operator's commands on books that no gateway serves.

use std::fs;
use std::process::{Command, Output};

use super::books::{Books, wallet};
use super::wallet::TestWallet;

/// `farebox ARGS` on a database. No chain answers.
pub fn farebox(books: &Books, args: &[&str]) -> Command {
    let config = books.scratch.path().join("farebox.toml");
    let text = format!(
        r#"
        database_url = "{}"
        [payments]
        network = "eip155:8453"
        rpc_urls = ["http://127.0.0.1:1"]
        pay_to = "{}"
        [[providers]]
        name = "test"
        kind = "openai"
        base_url = "http://127.0.0.1:1/v1"
        api_key_env = "TEST_PROVIDER_KEY"
        [[models]]
        id = "test/model"
        provider = "test"
        upstream_model = "model"
        context_length = 1000
        max_output_tokens = 100
        price = {{ prompt = "0.15", completion = "0.60" }}
        "#,
        books.url,
        wallet(99),
    );
    fs::write(&config, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_farebox"));
    command
        .args(args)
        .arg("--config")
        .arg(&config)
        .env_clear()
        .env("FAREBOX_RELAYER_KEY", TestWallet::random().private_key())
        .env("TEST_PROVIDER_KEY", "sk-test");
    command
}

/// What a command says that must succeed.
#[track_caller]
pub fn said(books: &Books, args: &[&str]) -> String {
    let output = farebox(books, args).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a command says on standard error that must fail.
#[track_caller]
pub fn refused(books: &Books, args: &[&str]) -> String {
    let output: Output = farebox(books, args).output().unwrap();
    assert!(!output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}
