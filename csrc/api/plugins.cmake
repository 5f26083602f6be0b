# greedy_copy_plugins(TARGET): where the core is linked in statically, it looks for plugins beside the program. This puts
# them there when TARGET is built. A shared core has them beside itself.
function(greedy_copy_plugins target)
  get_target_property(type greedy::core TYPE)
  if(type STREQUAL SHARED_LIBRARY)
    return()
  endif()
  get_target_property(plugins greedy::core GREEDY_PLUGINS)
  foreach(plugin ${plugins})
    # The command's $<TARGET_FILE> also makes TARGET wait for a plugin that this project builds.
    add_custom_command(TARGET ${target} POST_BUILD VERBATIM COMMAND ${CMAKE_COMMAND} -E copy_if_different
      $<TARGET_FILE:greedy::${plugin}> $<TARGET_FILE_DIR:${target}>)
  endforeach()
endfunction()
