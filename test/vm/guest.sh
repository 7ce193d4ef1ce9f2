#!/bin/bash
# guest.sh -- what the guests of uml-run.sh and vm-run.sh do alike. It is sourced in the
# guest, by their init, which has a function off.

# load_modules NAME MODULES: each as NAME or NAME:PARAMETER=VALUE,...
load_modules() {
  local me=$1 m n a
  for m in $2; do
    n=${m%%:*} a=
    [ "$n" = "$m" ] || a=${m#*:}
    modprobe "$n" ${a//,/ } || { echo "$me: modprobe $m failed" >>"$W/err"; echo 125 >"$W/rc"; off; }
  done
}

# run_command runs $W/cmd, streams what it writes, and leaves its exit code in $W/rc.
run_command() {
  local o e rc i
  # pipes, so that the command may reopen /dev/stdout; writes reach the host at once
  mkfifo /run/out /run/err
  cat </run/out >>"$W/out" & o=$!
  cat </run/err >>"$W/err" & e=$!
  setsid -w bash "$W/cmd" </dev/null >/run/out 2>/run/err
  rc=$?
  for ((i = 0; i < 50; i++)); do # 1 s for what left-over children still write
    kill -0 $o 2>/dev/null || kill -0 $e 2>/dev/null || break
    sleep 0.02
  done
  dmesg >"$W/dmesg" 2>/dev/null
  echo $rc >"$W/rc.new" && mv "$W/rc.new" "$W/rc"
}
