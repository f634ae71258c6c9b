//! `ctkeep man` and `ctkeep completions`: written from the very parser, so they cannot drift.

use clap::CommandFactory;

use super::Exit;
use super::args::{Cli, Completions};
use crate::audit::render;
use crate::error::{Op, Result};

pub(super) fn completions(args: &Completions) -> Result<Exit> {
    let mut out = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ctkeep", &mut out);
    render::text(&String::from_utf8_lossy(&out))?;
    Ok(Exit::Done)
}

/// ctkeep(8): the command itself, then each subcommand's options.
pub(super) fn man() -> Result<Exit> {
    let mut out = Vec::new();
    write(&mut out).map_err(|error| Op::new("write the manual page").io(error))?;
    render::text(&String::from_utf8_lossy(&out))?;
    Ok(Exit::Done)
}

fn write(out: &mut Vec<u8>) -> std::io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let page = clap_mangen::Man::new(command.clone()).section("8").manual("System administration");
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    page.render_options_section(out)?;
    for subcommand in command.get_subcommands().filter(|command| command.get_name() != "help") {
        out.extend(format!(".SH \"{}\"\n", subcommand.get_name().to_uppercase()).bytes());
        let page = clap_mangen::Man::new(subcommand.clone());
        let mut part = Vec::new();
        page.render_synopsis_section(&mut part)?;
        page.render_description_section(&mut part)?;
        page.render_options_section(&mut part)?;
        // Their headings become headings of the second rank.
        out.extend(String::from_utf8_lossy(&part).replace(".SH ", ".SS ").bytes());
    }
    out.extend(include_str!("manual.roff").bytes());
    Ok(())
}
