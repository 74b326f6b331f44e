//! Man pages and shell completions, of the definition of a command line. Used when a package is
//! made, and in no program that is shipped.

use clap::Command;
use clap_complete::Shell;
use std::fs;
use std::io;
use std::path::Path;

/// Writes them into `man`, `bash`, `zsh` and `fish` below `directory`, each under the name that it
/// is looked up by.
///
/// # Errors
/// The directory cannot be written to.
pub fn write(command: &Command, directory: &Path) -> io::Result<()> {
    let below = |part: &str| -> io::Result<_> {
        let below = directory.join(part);
        fs::create_dir_all(&below)?;
        Ok(below)
    };
    clap_mangen::generate_to(command.clone(), below("man")?)?;
    let name = command.get_name().to_owned();
    let completions = |shell, part| -> io::Result<_> {
        clap_complete::generate_to(shell, &mut command.clone(), &name, below(part)?)
    };
    let bash = completions(Shell::Bash, "bash")?;
    fs::rename(&bash, bash.with_file_name(&name))?;
    completions(Shell::Zsh, "zsh")?;
    completions(Shell::Fish, "fish")?;
    Ok(())
}

/// As the whole of a program: the directory is its only argument.
///
/// # Errors
/// It has none, or another number; or as for [`write()`].
pub fn run(command: &Command) -> io::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next()) {
        (Some(directory), None) => write(command, Path::new(&directory)),
        _ => Err(io::Error::other("give the directory to write into")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_and_each_shell_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let command = Command::new("tool").about("About it").subcommand(Command::new("go"));
        write(&command, directory.path()).unwrap();
        for file in ["man/tool.1", "man/tool-go.1", "bash/tool", "zsh/_tool", "fish/tool.fish"] {
            let text = fs::read_to_string(directory.path().join(file)).unwrap();
            assert!(text.contains("tool"), "{file}: {text}");
        }
    }
}
