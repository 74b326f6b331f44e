use super::*;

fn parse(line: &str) -> Result<Invocation, clap::Error> {
    Args::parse_from(std::iter::once("vhost-hotswap").chain(line.split_whitespace()))
}

fn config(line: &str) -> Config {
    match parse(line) {
        Ok(Invocation::Serve(config)) => *config,
        other => panic!("{line}: {other:?}"),
    }
}

/// The sentence of a refused line, after checking that it exits with 2.
fn refusal(line: &str) -> String {
    let error = parse(line).expect_err(line);
    assert_eq!(error.exit_code(), 2, "{line}");
    error.to_string()
}

#[test]
fn clap_agrees_with_the_definition() {
    Args::command().debug_assert();
}

#[test]
fn defaults() {
    let config = config("--socket-path /run/vm.sock");
    assert_eq!(config.listen, Listen::Path("/run/vm.sock".into()));
    assert_eq!(config.control_path, Path::new("/run/vm.sock.control"));
    assert_eq!((config.domain.as_str(), config.params), ("ramdisk", Params::default()));
    assert_eq!(
        (config.queues, config.queue_size, config.poll),
        (1, 1024, Duration::from_micros(50))
    );
    let exe = std::env::current_exe().unwrap();
    let beside = exe.parent().unwrap();
    assert_eq!(config.domain_dirs, [beside.to_owned(), beside.join("../lib/vhost-hotswap")]);
}

#[test]
fn everything_given() {
    let config = config(
        "--fd 7 --control-path c --domain ./x.so --domain-dir d --param size=1M --param serial=a=b \
         --queues 64 --queue-size 1024 --poll-us 1000000 --worker-cpus 3,0-1",
    );
    assert_eq!(config.worker_cpus, [3, 0, 1]);
    assert_eq!((config.listen, config.control_path), (Listen::Fd(7), "c".into()));
    assert_eq!((config.domain.as_str(), config.domain_dirs), ("./x.so", vec!["d".into()]));
    assert_eq!(config.params, Params::from_pairs(["size=1M", "serial=a=b"]).unwrap());
    assert_eq!((config.queues, config.queue_size, config.poll), (64, 1024, Duration::from_secs(1)));
}

#[test]
fn folders_of_modules_come_in_their_order() {
    let dirs = config("--socket-path s --domain-dir b --domain-dir a").domain_dirs;
    assert_eq!(dirs, [Path::new("b"), Path::new("a")]);
}

#[test]
fn only_a_server_of_a_supervisor_is_confined() {
    use crate::sandbox::Mode;
    assert_eq!(config("--socket-path s").sandbox, Mode::Off);
    assert_eq!(config("--socket-path s --sandbox=on").sandbox, Mode::On);
    assert_eq!(config("--socket-path s --no-supervisor --sandbox=off").sandbox, Mode::Off);
    let sentence = refusal("--socket-path s --no-supervisor --sandbox=on");
    assert!(sentence.contains("leave --no-supervisor out"), "{sentence}");
    assert!(refusal("--socket-path s --sandbox=maybe").contains("--sandbox"));
}

#[test]
fn keys_are_collected_and_not_looked_at() {
    let line = "--socket-path s --trusted-key a.pub --trusted-key RWQ";
    assert_eq!(config(line).trusted_keys, ["a.pub", "RWQ"]);
    assert!(refusal("--socket-path s --trusted-key").contains("--trusted-key"));
}

#[test]
fn exactly_one_place_to_listen() {
    assert!(refusal("").contains("give --socket-path PATH or --fd N"));
    assert!(refusal("--socket-path s --fd 3 --control-path c").contains("cannot be used with"));
    assert!(refusal("--fd -1 --control-path c").contains("--fd"));
    assert!(refusal("--fd x --control-path c").contains("--fd"));
    assert!(refusal("--fd 3").contains("give --control-path PATH"));
    assert!(refusal("--socket-path s --socket-path t").contains("multiple times"));
    assert!(refusal("--socket-path s stray").contains("stray"));
    let activated = config("--socket-activation --control-path c");
    assert_eq!(activated.listen, Listen::Activated);
    assert!(refusal("--socket-activation").contains("give --control-path PATH"));
    assert!(refusal("--socket-activation --fd 3 --control-path c").contains("cannot be used with"));
    assert!(refusal("--socket-activation --socket-path s").contains("cannot be used with"));
}

#[test]
fn the_sockets_mode_and_group_are_for_a_socket_of_our_own() {
    let given = config("--socket-path s --socket-mode 0660 --socket-group kvm");
    assert_eq!((given.socket_mode, given.socket_group.as_deref()), (0o660, Some("kvm")));
    assert_eq!(config("--socket-path s").socket_mode, 0o600);
    assert_eq!(config("--socket-path s --socket-mode 666").socket_mode, 0o666);
    for bad in ["0770", "0060", "0400", "1660", "0680", "+660", "rw", ""] {
        let error = refusal(&format!("--socket-path s --socket-mode={bad}"));
        assert!(error.contains("like 0660"), "{error}");
    }
    for listen in ["--fd 3 --control-path c", "--socket-activation --control-path c"] {
        for option in ["--socket-mode 0660", "--socket-group kvm"] {
            assert!(refusal(&format!("{listen} {option}")).contains("--socket-path"));
        }
    }
}

#[test]
fn a_serial_number_is_a_parameter() {
    let given = config("--socket-path s --serial WD-1");
    assert_eq!(given.params, Params::from_pairs(["serial=WD-1"]).unwrap());
    let twice = refusal("--socket-path s --serial a --param serial=b");
    assert!(twice.contains("--serial and --param serial="), "{twice}");
}

#[test]
fn socket_paths_are_usable() {
    let long = "x".repeat(SOCKET_PATH_MAX);
    assert!(refusal(&format!("--socket-path {long}x")).contains("at most 107"));
    assert!(refusal(&format!("--socket-path {long}")).contains("or give --control-path"));
    assert_eq!(
        config(&format!("--socket-path {long} --control-path c")).listen,
        Listen::Path(long.into())
    );
    assert!(refusal("--socket-path s --control-path s").contains("must differ"));
    let empty = Args::parse_from(["vhost-hotswap", "--socket-path", ""]).unwrap_err();
    assert_eq!(empty.exit_code(), 2);
}

#[test]
fn params_are_pairs_and_come_once() {
    assert!(refusal("--socket-path s --param size").contains("KEY=VALUE"));
    assert!(refusal("--socket-path s --param =1").contains("KEY=VALUE"));
    assert!(refusal("--socket-path s --param a=1 --param a=1").contains("given twice"));
}

#[test]
fn blk_file_is_short_for_the_file_domain() {
    let config = config("--socket-path s --blk-file /img --param direct=true --read-only");
    assert_eq!(config.domain, "file");
    assert_eq!(
        config.params,
        Params::from_pairs(["path=/img", "direct=true", "readonly=true"]).unwrap()
    );
    assert!(refusal("--socket-path s --blk-file f --domain file").contains("cannot be used with"));
    assert!(
        refusal("--socket-path s --blk-file f --domain ramdisk").contains("cannot be used with")
    );
    assert!(refusal("--socket-path s --blk-file f --param path=g").contains("--param path="));
    let empty =
        Args::parse_from(["vhost-hotswap", "--socket-path", "s", "--blk-file", ""]).unwrap_err();
    assert_eq!(empty.exit_code(), 2);
}

#[test]
fn read_only_is_for_the_file_domain() {
    for domain in ["file", "./libdomain_file.so"] {
        let config = config(&format!("--socket-path s --domain {domain} --read-only"));
        assert_eq!(config.params.get("readonly"), Some("true"));
    }
    assert!(refusal("--socket-path s --read-only").contains("not `ramdisk`"));
    assert!(refusal("--socket-path s --domain empty --read-only").contains("not `empty`"));
    assert!(
        refusal("--socket-path s --blk-file f --read-only --param readonly=false")
            .contains("readonly=")
    );
}

#[test]
fn an_empty_domain_is_refused() {
    let empty =
        Args::parse_from(["vhost-hotswap", "--socket-path", "s", "--domain", ""]).unwrap_err();
    assert_eq!(empty.exit_code(), 2);
}

#[test]
fn numbers_have_ranges() {
    for bad in ["--queues 0", "--queues 65", "--queues x", "--poll-us 1000001", "--poll-us -1"] {
        refusal(&format!("--socket-path s {bad}"));
    }
    for bad in ["0", "8", "100", "2048", "65536", "-16", "16.0"] {
        let sentence = refusal(&format!("--socket-path s --queue-size {bad}"));
        assert!(sentence.contains("--queue-size"), "{bad}: {sentence}");
    }
    assert_eq!(config("--socket-path s --queue-size 16").queue_size, 16);
}

#[test]
fn cpus_are_a_list() {
    for bad in ["", "x", "-1", "1-", "3-2", "1024", "0,", "0-99999999999"] {
        refusal(&format!("--socket-path s --worker-cpus={bad}"));
    }
}

#[test]
fn capabilities_win_over_everything() {
    for line in ["--print-capabilities", "--fd x --print-capabilities --no-such-option"] {
        assert_eq!(parse(line).unwrap(), Invocation::PrintCapabilities, "{line}");
    }
    let capabilities: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
    assert_eq!(
        capabilities,
        serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]})
    );
}

#[test]
fn help_and_version_are_no_errors() {
    assert_eq!(parse("--help").unwrap_err().exit_code(), 0);
    assert_eq!(parse("--version").unwrap_err().exit_code(), 0);
}
