//! The `moetrail` command.

mod args;
mod bench;
mod bundled;
mod doctor;
mod inspect;
mod load;
mod memory;
mod probe;
mod routes;
mod run;
mod serve;
mod summary;

use std::io::IsTerminal;

use clap::Parser;

use crate::args::{Args, Command};

fn main() -> std::process::ExitCode {
    memory::keep_freed();
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,hyper=warn".into()),
        )
        // Standard output belongs to what was asked for.
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match args.command {
        Command::Serve(args) => serve::serve(&args),
        Command::Run(args) => run::run(&args),
        Command::Routes(command) => routes::routes(&command),
        Command::Bench(args) => bench::bench(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Inspect(args) => inspect::inspect(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            // One line, causes included.
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
