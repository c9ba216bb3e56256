#!/bin/sh
# A private Postfix as a DMZ relay on loopback, apart from any system Postfix: the reference of the benchmarks.
# usage: postfix.sh start|stop|pid          (root; Debian packages postfix, openssl; sasl2-bin, libsasl2-modules for logins)
#   BENCH_STATE   state folder     (default: ${TMPDIR:-/tmp}/relay-bench)
#   PF_PORT       listener         (default 2600)    SINK_PORT   next hop      (default 2601)
#   PF_PROCS      process limit    (default 150)     PF_RCPTS    addresses     (default 100000)
#   PF_SUBMISSION listener with AUTH by Cyrus SASL: user bench@bench, password secret   (default: none)
#   PF_EXTRA      more main.cf lines, written last: they win
set -eu
STATE=${BENCH_STATE:-${TMPDIR:-/tmp}/relay-bench}
PORT=${PF_PORT:-2600} SINK=${SINK_PORT:-2601} PROCS=${PF_PROCS:-150} N=${PF_RCPTS:-100000}
C=$STATE/postfix/conf Q=$STATE/postfix/queue D=$STATE/postfix/data
PATH=$PATH:/usr/sbin

case ${1:-} in
pid) exec tr -d ' ' <"$Q/pid/master.pid" ;;
stop)
    postfix -c "$C" stop 2>/dev/null || true
    exit 0
    ;;
start) ;;
*)
    sed -n 2,8p "$0" >&2
    exit 2
    ;;
esac

mkdir -p "$C" "$Q" "$D"
chmod 755 "$STATE" "$STATE/postfix" "$C" "$Q"
chown postfix "$D"
if [ ! -f "$STATE/cert.pem" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
        -subj /CN=localhost -keyout "$STATE/key.pem" -out "$STATE/cert.pem" 2>/dev/null
fi

if [ -n "${PF_SUBMISSION:-}" ]; then
    mkdir -p "$C/sasl"
    printf 'pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN\nsasldb_path: %s\n' \
        "$STATE/sasldb2" >"$C/sasl/smtpd.conf"
    if [ ! -f "$STATE/sasldb2" ]; then
        echo secret | saslpasswd2 -p -c -u bench -f "$STATE/sasldb2" bench
        chown postfix "$STATE/sasldb2"
    fi
fi

# What the relay does as well: recipient map, sizes, log to a file. Switched off as the relay's are for the runs: client
# limits, error budgets, tarpit. in_flow_delay would slow the intake down to the delivery's speed.
cat >"$C/main.cf" <<CF
compatibility_level = 3.6
config_directory = $C
queue_directory = $Q
data_directory = $D
maillog_file = $STATE/postfix/mail.log
maillog_file_prefixes = $STATE
myhostname = relay.bench.test
mydestination =
local_recipient_maps =
local_transport = error:no local mail
alias_maps =
mynetworks =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
relay_domains = example.com
relay_recipient_maps = hash:$C/rcpts-$N
transport_maps = inline:{example.com=relay:[127.0.0.1]:$SINK}
smtpd_recipient_restrictions = reject_unauth_destination
default_process_limit = $PROCS
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
smtpd_error_sleep_time = 0
smtpd_soft_error_limit = 1000000
smtpd_hard_error_limit = 1000000
smtpd_recipient_overshoot_limit = 1000000
smtpd_tls_cert_file = $STATE/cert.pem
smtpd_tls_key_file = $STATE/key.pem
smtpd_tls_security_level = may
smtpd_sasl_path = smtpd
cyrus_sasl_config_path = $C/sasl
smtpd_sasl_local_domain = bench
default_destination_concurrency_limit = 20
initial_destination_concurrency = 20
relay_destination_concurrency_limit = 20
in_flow_delay = 0
max_use = 1000
message_size_limit = 52428800
maximal_queue_lifetime = 1h
bounce_queue_lifetime = 1h
minimal_backoff_time = 5s
${PF_EXTRA:-}
CF
cat >"$C/master.cf" <<CF
127.0.0.1:$PORT inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
CF
if [ -n "${PF_SUBMISSION:-}" ]; then
    cat >>"$C/master.cf" <<CF
127.0.0.1:$PF_SUBMISSION inet n - n - - smtpd
  -o smtpd_sasl_auth_enable=yes -o smtpd_tls_auth_only=yes
  -o smtpd_recipient_restrictions=permit_sasl_authenticated,reject
CF
fi
[ -f "$STATE/rcpts-$N" ] || seq 0 $((N - 1)) | sed 's/$/user@example.com/' >"$STATE/rcpts-$N"
if [ ! -f "$C/rcpts-$N.db" ]; then
    sed 's/$/ OK/' "$STATE/rcpts-$N" >"$C/rcpts-$N"
    postmap -c "$C" "hash:$C/rcpts-$N"
fi
postfix -c "$C" stop 2>/dev/null || true
postfix -c "$C" start 2>&1 | grep -v "overriding earlier entry" >&2 || true
